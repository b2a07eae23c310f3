"""Two models along one text: how far apart they are before each of its tokens.

Both read the same tokens (teacher forcing), so nothing that one of them would have said instead
leads the other astray. The distance is the Kullback-Leibler divergence over the whole vocabulary,
which the few likeliest tokens of an ordinary answer could not give.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from workers.engine.answers import Run, check_tokens, sender, too_long
from workers.engine.chat import encode_chat, encode_text
from workers.engine.errors import bad_request
from workers.engine.fields import Json
from workers.engine.generate import Piece, Sampling, Sequence
from workers.engine.openai import CompareRequest

# The reference's distributions are held until the model has been read: 512 rows of a vocabulary of
# 128,000 words take 260 MB.
MAX_COMPARED_TOKENS = 512


class WatchedSequence(Sequence):
    """Reads a text as a prompt and shows the logits before each of its tokens but the first."""

    def __init__(self, *args: Any, watch: Callable[[torch.Tensor], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watch = watch

    def _piece(
        self, token_id: int, logits: torch.Tensor | None, *, text: str | None = None
    ) -> Piece:
        if logits is not None:
            self._watch(logits)
        return super()._piece(token_id, logits, text=text)


@dataclass(slots=True, kw_only=True)
class Distances:
    """What is found position by position; `prompt_tokens` says how many rows only lead there.

    Rows are compared over the first `vocabulary` words, which both models have.
    """

    prompt_tokens: int
    completion: tuple[int, ...]
    vocabulary: int
    kl: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    likeliest: list[int] = field(default_factory=list)
    reference_logprobs: list[float] = field(default_factory=list)
    reference_likeliest: list[int] = field(default_factory=list)
    _rows: list[torch.Tensor] = field(default_factory=list)
    _to_skip: int = 0

    def begin(self) -> None:
        """The rows of another model follow; the first token of a text has none."""
        self._to_skip = self.prompt_tokens - 1

    def take_reference(self, logits: torch.Tensor) -> None:
        if (row := self._next_row(logits)) is not None:
            token = self.completion[len(self._rows)]
            self._rows.append(row)
            self.reference_logprobs.append(float(row[token]))
            self.reference_likeliest.append(int(row.argmax()))

    def take_model(self, logits: torch.Tensor) -> None:
        if (row := self._next_row(logits)) is not None:
            position = len(self.kl)
            reference = self._rows[position].double()
            distance = (reference.exp() * (reference - row.double())).sum()
            self.kl.append(max(0.0, float(distance)))
            self.logprobs.append(float(row[self.completion[position]]))
            self.likeliest.append(int(row.argmax()))

    def _next_row(self, logits: torch.Tensor) -> torch.Tensor | None:
        if self._to_skip:
            self._to_skip -= 1
            return None
        return torch.log_softmax(logits[: self.vocabulary].float().cpu(), dim=-1)


async def compare(run: Run, reference: Run, asked: CompareRequest) -> Json:
    """Read the text with the reference, then with the model, and say where they differ."""
    tokenizer = reference.model.tokenizer
    prompt, completion = await asyncio.to_thread(_encode, tokenizer, asked)
    tokens = prompt + completion
    for each in (run, reference):
        check_tokens(prompt, each.model, "messages" if asked.messages else "prompt")
        check_tokens(completion, each.model, "completion")
        if len(tokens) > each.model.context_tokens:
            raise too_long(each.model, len(prompt), len(completion), "completion")
    found = Distances(
        prompt_tokens=len(prompt),
        completion=completion,
        vocabulary=min(run.model.vocabulary, reference.model.vocabulary),
    )
    await _read(reference, tokens, found, found.take_reference)
    await _read(run, tokens, found, found.take_model)
    return _describe(found, asked, tokenizer)


def _encode(tokenizer: Any, asked: CompareRequest) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if asked.messages is not None:
        prompt = encode_chat(tokenizer, list(asked.messages))
    elif isinstance(asked.prompt, str):
        prompt = encode_text(tokenizer, asked.prompt)
    else:
        prompt = asked.prompt or ()
    completion = asked.completion
    if isinstance(completion, str):
        completion = tuple(tokenizer(completion, add_special_tokens=False)["input_ids"])
    if len(completion) > MAX_COMPARED_TOKENS:
        raise bad_request(
            f"A completion of at most {MAX_COMPARED_TOKENS} tokens can be compared;"
            f" this one has {len(completion)}.",
            "completion",
        )
    return prompt, completion


async def _read(
    run: Run,
    tokens: tuple[int, ...],
    found: Distances,
    watch: Callable[[torch.Tensor], None],
) -> None:
    found.begin()
    sequence = WatchedSequence(
        run.model,
        tokens,
        sampling=Sampling(),
        max_tokens=0,
        score_prompt=True,
        prefill_chunk=run.config.prefill_chunk_tokens,
        emit=sender(run, 0),
        watch=watch,
    )
    run.scheduler.submit([sequence])
    run.prompts, run.sequences = [tokens], [sequence]
    async for _ in run.each():
        pass


def _describe(found: Distances, asked: CompareRequest, tokenizer: Any) -> Json:
    def spell(token: int) -> str:
        return str(tokenizer.decode([token]))

    pairs = zip(found.likeliest, found.reference_likeliest, strict=True)
    departures = [at for at, (mine, theirs) in enumerate(pairs) if mine != theirs]
    tokens = [
        {
            "token": spell(token),
            "token_id": token,
            "kl": found.kl[at],
            "logprob": found.logprobs[at],
            "reference_logprob": found.reference_logprobs[at],
            "likeliest": spell(found.likeliest[at]),
            "reference_likeliest": spell(found.reference_likeliest[at]),
        }
        for at, token in enumerate(found.completion)
    ]
    return {
        "object": "comparison",
        "model": asked.model,
        "reference": asked.reference,
        "vocabulary": found.vocabulary,
        "prompt_tokens": found.prompt_tokens,
        # Where the two would choose different tokens for the first time.
        "first_departure": departures[0] if departures else None,
        "departures": len(departures),
        "mean_kl": sum(found.kl) / len(found.kl),
        "max_kl": max(found.kl),
        "tokens": tokens,
    }
