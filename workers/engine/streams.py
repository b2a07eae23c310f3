"""Answers as server-sent events: one chunk a piece of text, then the usage, then [DONE]."""

import json
from collections.abc import AsyncIterator

from workers.engine.answers import Run, echoed_text
from workers.engine.fields import Json
from workers.engine.generate import Finish, Piece
from workers.engine.openai import ChatRequest, CompletionRequest, Delivery
from workers.engine.responses import chat_logprobs, completion_logprobs, usage

DONE = "data: [DONE]\n\n"


async def stream_chat(run: Run, asked: ChatRequest) -> AsyncIterator[str]:
    chunks = _Chunks(run, "chat.completion.chunk", asked.delivery)
    for index in range(len(run.sequences)):
        yield chunks.chat(index, {"role": "assistant", "content": ""})
    async for index, event in run.each():
        if isinstance(event, Finish):
            chunks.produced += event.completion_tokens
            if event.text:
                yield chunks.chat(index, {"content": event.text})
            yield chunks.chat(index, {}, reason=event.reason)
        elif chunks.is_worth_sending(event):
            yield chunks.chat(index, {"content": event.text}, piece=event)
    for line in chunks.end():
        yield line


async def stream_completion(run: Run, asked: CompletionRequest) -> AsyncIterator[str]:
    chunks = _Chunks(run, "text_completion", asked.delivery)
    echoes = {index: _Echo(run, asked, index) for index in range(len(run.sequences))}
    offsets = dict.fromkeys(echoes, 0)
    async for index, event in run.each():
        echo = echoes[index]
        if isinstance(event, Piece) and echo.takes(event):
            continue
        if echo.is_due:
            text, pieces = echo.give()
            logprobs = completion_logprobs(pieces) if pieces else None
            yield chunks.completion(index, text, logprobs=logprobs)
            offsets[index] = sum(len(piece.text) for piece in pieces) or len(text)
        if isinstance(event, Finish):
            chunks.produced += event.completion_tokens
            yield chunks.completion(index, event.text, reason=event.reason)
        elif chunks.is_worth_sending(event):
            logprobs = None
            if event.logprob is not None:
                logprobs = completion_logprobs([event], offset_chars=offsets[index])
            offsets[index] += len(event.text)
            yield chunks.completion(index, event.text, logprobs=logprobs, piece=event)
    for line in chunks.end():
        yield line


class _Echo:
    """The prompt given back: in one chunk, with its scores when they were asked for."""

    def __init__(self, run: Run, asked: CompletionRequest, index: int) -> None:
        self.is_due = asked.echo
        self._text = echoed_text(run, asked, index) if asked.echo else ""
        self._waits_for = len(run.prompts[run.prompt_of(index)]) if asked.scores_prompt else 0
        self._pieces: list[Piece] = []

    def takes(self, piece: Piece) -> bool:
        """Keep a piece that scores the prompt until all of them are there."""
        if len(self._pieces) == self._waits_for:
            return False
        self._pieces.append(piece)
        return True

    def give(self) -> tuple[str, list[Piece]]:
        self.is_due = False
        return self._text, self._pieces


class _Chunks:
    """Writes the chunks of one answer."""

    def __init__(self, run: Run, kind: str, delivery: Delivery) -> None:
        self._run = run
        self._envelope = run.answer.envelope(kind)
        self._delivery = delivery
        self.produced = 0

    def is_worth_sending(self, piece: Piece) -> bool:
        """Half a character has no text yet; it is sent only for what else it carries."""
        return bool(piece.text) or piece.logprob is not None or self._delivery.token_ids

    def chat(
        self, index: int, delta: Json, *, reason: str | None = None, piece: Piece | None = None
    ) -> str:
        has_scores = piece is not None and piece.logprob is not None
        choice: Json = {
            "index": index,
            "delta": delta,
            "finish_reason": reason,
            "logprobs": chat_logprobs([piece]) if piece and has_scores else None,
        }
        return self._event(choice, piece)

    def completion(
        self,
        index: int,
        text: str,
        *,
        reason: str | None = None,
        logprobs: Json | None = None,
        piece: Piece | None = None,
    ) -> str:
        choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}
        return self._event(choice, piece)

    def _event(self, choice: Json, piece: Piece | None) -> str:
        if self._delivery.token_ids:
            choice["token_ids"] = [] if piece is None else [piece.token_id]
        payload: Json = {**self._envelope, "choices": [choice]}
        if self._delivery.include_usage:
            # Every chunk carries the key; only the last one has numbers.
            payload["usage"] = None
        return f"data: {json.dumps(payload)}\n\n"

    def end(self) -> list[str]:
        if not self._delivery.include_usage:
            return [DONE]
        counts = usage(self._run.prompt_tokens, self.produced)
        payload = {**self._envelope, "choices": [], "usage": counts}
        return [f"data: {json.dumps(payload)}\n\n", DONE]
