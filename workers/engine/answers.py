"""From a parsed request to running sequences, and from their events to responses."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from deltacome_core.errors import InternalError
from workers.engine import openai
from workers.engine.chat import encode_chat, encode_text
from workers.engine.config import EngineConfig
from workers.engine.errors import bad_request, broken
from workers.engine.generate import Event, Failure, Finish, Piece, Sampling, Sequence
from workers.engine.model import LoadedModel
from workers.engine.openai import Answer, ChatRequest, CompletionRequest, Json
from workers.engine.scheduler import Scheduler

DONE = "data: [DONE]\n\n"


@dataclass(slots=True, kw_only=True)
class Run:
    """One request: its model, its sequences, and the events they send."""

    answer: Answer
    model: LoadedModel
    config: EngineConfig
    scheduler: Scheduler
    release: Callable[[], None]
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    events: asyncio.Queue[tuple[int, Event]] = field(default_factory=asyncio.Queue)
    streams: bool = False
    closed: bool = False

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    def close(self) -> None:
        """Stop what still runs and let go of the model. Safe to call twice."""
        if self.closed:
            return
        self.closed = True
        for sequence in self.sequences:
            sequence.cancel()
        self.release()

    async def each(self) -> AsyncIterator[tuple[int, Piece | Finish]]:
        """Events of all sequences as they come, until the last one has finished."""
        left = len(self.sequences)
        while left:
            index, event = await self.events.get()
            if isinstance(event, Failure):
                raise broken("The engine failed on this request.", code="internal")
            left -= isinstance(event, Finish)
            yield index, event


async def start_chat(run: Run, asked: ChatRequest) -> None:
    prompt = await asyncio.to_thread(encode_chat, run.model.tokenizer, list(asked.messages))
    _start(run, [prompt], asked.sampling, default_tokens=None, score_prompt=False)


async def start_completion(run: Run, asked: CompletionRequest) -> None:
    prompts = await asyncio.to_thread(
        lambda: [
            encode_text(run.model.tokenizer, prompt) if isinstance(prompt, str) else prompt
            for prompt in asked.prompts
        ]
    )
    score_prompt = asked.echo and asked.sampling.logprobs is not None
    _start(run, prompts, asked.sampling, default_tokens=16, score_prompt=score_prompt)


def _start(
    run: Run,
    prompts: list[tuple[int, ...]],
    sampling: Sampling,
    *,
    default_tokens: int | None,
    score_prompt: bool,
) -> None:
    loop = asyncio.get_running_loop()

    def sender(index: int) -> Callable[[Event], None]:
        def send(event: Event) -> None:
            # The loop is gone when the process stops in the middle of an answer.
            if not loop.is_closed():
                loop.call_soon_threadsafe(run.events.put_nowait, (index, event))

        return send

    sequences = [
        Sequence(
            run.model,
            prompt,
            sampling=sampling,
            max_tokens=_token_limit(run, prompt, sampling.max_tokens, default_tokens),
            score_prompt=score_prompt,
            prefill_chunk=run.config.prefill_chunk_tokens,
            emit=sender(index),
        )
        for index, prompt in enumerate(prompts)
    ]
    run.scheduler.submit(sequences)
    run.prompts, run.sequences = prompts, sequences


def _token_limit(run: Run, prompt: tuple[int, ...], wanted: int | None, default: int | None) -> int:
    context = run.model.context_tokens
    if not prompt:
        raise bad_request("The prompt has no tokens.", "prompt")
    if not all(0 <= token < run.model.vocabulary for token in prompt):
        raise bad_request(
            f"A token id lies outside the vocabulary of {run.model.vocabulary}.", "prompt"
        )
    if wanted is not None and wanted > run.config.max_output_tokens:
        raise bad_request(
            f"max_tokens may be at most {run.config.max_output_tokens} here.", "max_tokens"
        )
    room = context - len(prompt)
    if room < (1 if wanted is None else wanted):
        raise bad_request(
            f"This model's context holds {context} tokens; the prompt has {len(prompt)}"
            f" and {1 if wanted is None else wanted} were asked for.",
            "messages" if default is None else "prompt",
            code="context_length_exceeded",
        )
    if wanted is not None:
        return wanted
    return min(room, default or run.config.max_output_tokens)


async def collect_chat(run: Run) -> Json:
    pieces, finish = (await _collect(run))[0]
    message = {"role": "assistant", "content": _join(pieces, finish), "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": finish.reason, "logprobs": None}
    if pieces and pieces[0].logprob is not None:
        choice["logprobs"] = openai.chat_logprobs(pieces)
    return {
        **run.answer.envelope("chat.completion"),
        "choices": [choice],
        "usage": openai.usage(run.prompt_tokens, finish.completion_tokens),
    }


async def collect_completion(run: Run, asked: CompletionRequest) -> Json:
    collected = await _collect(run)
    choices = [
        _completion_choice(run, asked, index, pieces, finish)
        for index, (pieces, finish) in enumerate(collected)
    ]
    produced = sum(finish.completion_tokens for _, finish in collected)
    return {
        **run.answer.envelope("text_completion"),
        "choices": choices,
        "usage": openai.usage(run.prompt_tokens, produced),
    }


def _completion_choice(
    run: Run, asked: CompletionRequest, index: int, pieces: list[Piece], finish: Finish
) -> Json:
    scored = asked.echo and asked.sampling.logprobs is not None
    answer = pieces[len(run.prompts[index]) :] if scored else pieces
    text = _join(answer, finish)
    if asked.echo:
        prompt = asked.prompts[index]
        text = (prompt if isinstance(prompt, str) else _decode(run, prompt)) + text
    logprobs = None
    if asked.sampling.logprobs is not None:
        logprobs = openai.completion_logprobs(pieces)
    return {"index": index, "text": text, "finish_reason": finish.reason, "logprobs": logprobs}


def _decode(run: Run, prompt: Iterable[int]) -> str:
    return str(run.model.tokenizer.decode(list(prompt)))


def _join(pieces: list[Piece], finish: Finish) -> str:
    return "".join(piece.text for piece in pieces) + finish.text


async def _collect(run: Run) -> list[tuple[list[Piece], Finish]]:
    pieces: list[list[Piece]] = [[] for _ in run.sequences]
    finishes: dict[int, Finish] = {}
    async for index, event in run.each():
        if isinstance(event, Finish):
            finishes[index] = event
        else:
            pieces[index].append(event)
    if len(finishes) != len(pieces):
        raise InternalError("a sequence ended without a finish")
    return [(found, finishes[index]) for index, found in enumerate(pieces)]


async def stream_chat(run: Run, asked: ChatRequest) -> AsyncIterator[str]:
    envelope = run.answer.envelope("chat.completion.chunk")

    def chunk(delta: Json, *, reason: str | None = None, logprobs: Json | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        return _event(envelope, [choice], asked.include_usage)

    yield chunk({"role": "assistant", "content": ""})
    produced = 0
    async for _index, event in run.each():
        if isinstance(event, Finish):
            produced = event.completion_tokens
            if event.text:
                yield chunk({"content": event.text})
            yield chunk({}, reason=event.reason)
        elif event.text or event.logprob is not None:
            logprobs = None if event.logprob is None else openai.chat_logprobs([event])
            yield chunk({"content": event.text}, logprobs=logprobs)
    if asked.include_usage:
        yield _usage_event(envelope, run, produced)
    yield DONE


async def stream_completion(run: Run, asked: CompletionRequest) -> AsyncIterator[str]:
    envelope = run.answer.envelope("text_completion")
    offsets = [0 for _ in run.sequences]

    def chunk(index: int, text: str, *, reason: str | None, logprobs: Json | None) -> str:
        choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}
        return _event(envelope, [choice], asked.include_usage)

    produced = 0
    async for index, event in run.each():
        if isinstance(event, Finish):
            produced += event.completion_tokens
            yield chunk(index, event.text, reason=event.reason, logprobs=None)
            continue
        if not event.text and event.logprob is None:
            continue
        logprobs = None
        if event.logprob is not None:
            logprobs = openai.completion_logprobs([event], offset_chars=offsets[index])
        offsets[index] += len(event.text)
        yield chunk(index, event.text, reason=None, logprobs=logprobs)
    if asked.include_usage:
        yield _usage_event(envelope, run, produced)
    yield DONE


def _event(envelope: Json, choices: list[Json], include_usage: bool) -> str:  # noqa: FBT001 (private)
    # With include_usage every chunk carries the key; only the last one has numbers.
    payload: dict[str, Any] = {**envelope, "choices": choices}
    if include_usage:
        payload["usage"] = None
    return f"data: {json.dumps(payload)}\n\n"


def _usage_event(envelope: Json, run: Run, produced: int) -> str:
    payload = {**envelope, "choices": [], "usage": openai.usage(run.prompt_tokens, produced)}
    return f"data: {json.dumps(payload)}\n\n"
