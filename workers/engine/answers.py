"""From a parsed request to running sequences, and from their events to whole responses."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field, replace

from deltacome_core.errors import InternalError
from workers.engine.chat import encode_chat, encode_text
from workers.engine.config import EngineConfig
from workers.engine.errors import ApiError, bad_request, broken
from workers.engine.fields import Json
from workers.engine.generate import Event, Failure, Finish, Piece, Sampling, Sequence
from workers.engine.model import LoadedModel
from workers.engine.openai import ChatRequest, CompletionRequest
from workers.engine.responses import (
    Answer,
    chat_logprobs,
    completion_logprobs,
    join_text,
    usage,
)
from workers.engine.scheduler import Scheduler

DEFAULT_COMPLETION_TOKENS = 16


@dataclass(slots=True, kw_only=True)
class Run:
    """One request: its model, its sequences, and the events they send.

    The choices of one prompt stand side by side: sequence i answers prompt i // n.
    """

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
        """A prompt counts once, however many choices continue it."""
        return sum(len(prompt) for prompt in self.prompts)

    def prompt_of(self, index: int) -> int:
        """Return the number of the prompt that a choice continues."""
        return index * len(self.prompts) // len(self.sequences)

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
                # What the scheduler says to the client, such as that the engine stops.
                if isinstance(event.error, ApiError):
                    raise event.error
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
    _start(
        run,
        prompts,
        asked.sampling,
        default_tokens=DEFAULT_COMPLETION_TOKENS,
        score_prompt=asked.scores_prompt,
    )


def _start(
    run: Run,
    prompts: list[tuple[int, ...]],
    sampling: Sampling,
    *,
    default_tokens: int | None,
    score_prompt: bool,
) -> None:
    limits = [_token_limit(run, prompt, sampling.max_tokens, default_tokens) for prompt in prompts]
    sequences: list[Sequence] = []
    for prompt, limit in zip(prompts, limits, strict=True):
        for choice in range(sampling.n):
            sequence = Sequence(
                run.model,
                prompt,
                sampling=replace(sampling, choice=choice),
                max_tokens=limit,
                score_prompt=score_prompt,
                prefill_chunk=run.config.prefill_chunk_tokens,
                emit=sender(run, len(sequences)),
            )
            sequences.append(sequence)
    run.scheduler.submit(sequences)
    run.prompts, run.sequences = prompts, sequences


def sender(run: Run, index: int) -> Callable[[Event], None]:
    """Make what carries the events of one sequence from the computing thread to the run."""
    loop = asyncio.get_running_loop()

    def send(event: Event) -> None:
        # The loop is gone when the process stops in the middle of an answer.
        if not loop.is_closed():
            loop.call_soon_threadsafe(run.events.put_nowait, (index, event))

    return send


def _token_limit(run: Run, prompt: tuple[int, ...], wanted: int | None, default: int | None) -> int:
    param = "messages" if default is None else "prompt"
    check_tokens(prompt, run.model, param)
    if wanted is not None and wanted > run.config.max_output_tokens:
        raise bad_request(
            f"max_tokens may be at most {run.config.max_output_tokens} here.", "max_tokens"
        )
    room = run.model.context_tokens - len(prompt)
    least = 1 if wanted is None else wanted
    if room < least:
        raise too_long(run.model, len(prompt), least, param)
    if wanted is not None:
        return wanted
    return min(room, default or run.config.max_output_tokens)


def check_tokens(tokens: tuple[int, ...], model: LoadedModel, param: str) -> None:
    if not tokens:
        raise bad_request(f"{param} has no tokens.", param)
    if not all(0 <= token < model.vocabulary for token in tokens):
        raise bad_request(f"A token id lies outside the vocabulary of {model.vocabulary}.", param)


def too_long(model: LoadedModel, prompt_tokens: int, wanted: int, param: str) -> Exception:
    return bad_request(
        f"This model's context holds {model.context_tokens} tokens; the prompt has"
        f" {prompt_tokens} and {wanted} were asked for.",
        param,
        code="context_length_exceeded",
    )


async def collect_chat(run: Run, asked: ChatRequest) -> Json:
    collected = await _collect(run)
    choices = []
    for index, (pieces, finish) in enumerate(collected):
        message = {"role": "assistant", "content": join_text(pieces, finish), "refusal": None}
        choice: Json = {
            "index": index,
            "message": message,
            "finish_reason": finish.reason,
            "logprobs": None if asked.sampling.logprobs is None else chat_logprobs(pieces),
        }
        if asked.delivery.token_ids:
            choice["token_ids"] = [piece.token_id for piece in pieces]
        choices.append(choice)
    return _response(run, "chat.completion", choices, collected)


async def collect_completion(run: Run, asked: CompletionRequest) -> Json:
    collected = await _collect(run)
    choices = [
        _completion_choice(run, asked, index, pieces, finish)
        for index, (pieces, finish) in enumerate(collected)
    ]
    return _response(run, "text_completion", choices, collected)


def _response(
    run: Run, kind: str, choices: list[Json], collected: list[tuple[list[Piece], Finish]]
) -> Json:
    produced = sum(finish.completion_tokens for _, finish in collected)
    return {
        **run.answer.envelope(kind),
        "choices": choices,
        "usage": usage(run.prompt_tokens, produced),
    }


def _completion_choice(
    run: Run, asked: CompletionRequest, index: int, pieces: list[Piece], finish: Finish
) -> Json:
    answer = pieces[len(run.prompts[run.prompt_of(index)]) :] if asked.scores_prompt else pieces
    text = join_text(answer, finish)
    if asked.echo:
        text = echoed_text(run, asked, index) + text
    choice: Json = {
        "index": index,
        "text": text,
        "finish_reason": finish.reason,
        "logprobs": None if asked.sampling.logprobs is None else completion_logprobs(pieces),
    }
    if asked.delivery.token_ids:
        choice["prompt_token_ids"] = list(run.prompts[run.prompt_of(index)])
        choice["token_ids"] = [piece.token_id for piece in answer]
    return choice


def echoed_text(run: Run, asked: CompletionRequest, index: int) -> str:
    prompt = asked.prompts[run.prompt_of(index)]
    return prompt if isinstance(prompt, str) else _decode(run, prompt)


def _decode(run: Run, prompt: Iterable[int]) -> str:
    return str(run.model.tokenizer.decode(list(prompt)))


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
