"""One answer in the making: prefill in chunks, then one token a step."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from workers.engine.text import TextStream

# Seeds that lie side by side must not share draws with the choices of each other.
_CHOICE_STRIDE = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose tokens; `max_tokens` None = up to the limit, `logprobs` None = not wanted.

    `n` answers to one prompt are `n` sequences, told apart by their `choice`: with a seed each
    draws its own tokens, and the same ones every time.
    """

    n: int = 1
    choice: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One token: its own spelling, the text it releases, its chance and the likeliest others.

    `top_ids` are the ids of `top`, in its order.
    """

    token_id: int
    token: str
    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...]
    top_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """`reason` is stop or length; `stop` the stop string that ended the answer, if one did."""

    reason: str
    text: str
    completion_tokens: int
    stop: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    error: Exception


Event = Piece | Finish | Failure


class ServedModel(Protocol):
    """What generation needs to know of a backbone or a backbone with its delta."""

    @property
    def module(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def eos_ids(self) -> frozenset[int]: ...
    @property
    def device(self) -> str: ...


class Sequence:
    """The state of one answer. `step` is called by one thread at a time; `cancel` by any.

    `tenant` is who shares the engine's time with others; by default that is the model.
    """

    def __init__(
        self,
        model: ServedModel,
        prompt: tuple[int, ...],
        *,
        sampling: Sampling,
        max_tokens: int,
        score_prompt: bool,
        prefill_chunk: int,
        emit: Callable[[Event], None],
        tenant: str | None = None,
    ) -> None:
        self.tenant = tenant
        self._model = model
        self._prompt = prompt
        self._sampling = sampling
        self._left = max_tokens
        self._score_prompt = score_prompt
        self._chunk = prefill_chunk
        self._emit = emit
        self._cache = DynamicCache(config=model.module.config)
        self._fed = 0
        self._last: int | None = None
        self._counts: Counter[int] = Counter()
        self._text = TextStream(model.tokenizer, sampling.stop)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            # 64 bits without a sign are what a generator takes.
            self._generator.manual_seed((sampling.seed + sampling.choice * _CHOICE_STRIDE) % 2**63)
        self.cancelled = False
        self.finished = False

    def cancel(self) -> None:
        self.cancelled = True

    def fail(self, error: Exception) -> None:
        self.finished = True
        self._emit(Failure(error=error))

    @torch.inference_mode()
    def step(self) -> None:
        """Feed the next chunk of the prompt, or the last token, and emit what that decides."""
        if self._fed == 0 and self._score_prompt:
            self._emit(self._piece(self._prompt[0], None))
        if self._fed < len(self._prompt):
            logits = self._prefill()
            if self._fed < len(self._prompt):
                return
        else:
            logits = self._forward([self._last or 0], keep=1)[-1]
        if self._left == 0:
            self._finish("length")
            return
        self._choose(logits)

    def _prefill(self) -> torch.Tensor:
        chunk = list(self._prompt[self._fed : self._fed + self._chunk])
        logits = self._forward(chunk, keep=len(chunk) if self._score_prompt else 1)
        start, self._fed = self._fed, self._fed + len(chunk)
        if self._score_prompt:
            targets = self._prompt[start + 1 : self._fed + 1]
            for target, row in zip(targets, logits, strict=False):
                self._emit(self._piece(target, row))
        return logits[-1]

    def _forward(self, ids: list[int], *, keep: int) -> torch.Tensor:
        output = self._model.module(
            input_ids=torch.tensor([ids], device=self._model.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = output.logits[0].float().cpu()
        return logits

    def _choose(self, logits: torch.Tensor) -> None:
        token_id = choose_token(
            logits, self._sampling, counts=self._counts, generator=self._generator
        )
        self._last = token_id
        self._counts[token_id] += 1
        self._left -= 1
        ends = token_id in self._model.eos_ids
        text = "" if ends else self._text.push(token_id)
        self._emit(self._piece(token_id, logits, text=text))
        if ends or self._text.stopped:
            self._finish("stop")
        elif self._left == 0:
            self._finish("length")

    def _finish(self, reason: str) -> None:
        text = self._text.flush()
        self.finished = True
        self._emit(
            Finish(
                reason="stop" if self._text.stopped else reason,
                text=text,
                completion_tokens=self._counts.total(),
                stop=self._text.stopped_by,
            )
        )

    def _piece(
        self, token_id: int, logits: torch.Tensor | None, *, text: str | None = None
    ) -> Piece:
        token = self._spell(token_id)
        logprob: float | None = None
        top: tuple[tuple[str, float], ...] = ()
        top_ids: tuple[int, ...] = ()
        if logits is not None and self._sampling.logprobs is not None:
            logprob, top, top_ids = self._score(logits, token_id, self._sampling.logprobs)
        return Piece(
            token_id=token_id,
            token=token,
            text=token if text is None else text,
            logprob=logprob,
            top=top,
            top_ids=top_ids,
        )

    def _score(
        self, logits: torch.Tensor, token_id: int, wanted: int
    ) -> tuple[float, tuple[tuple[str, float], ...], tuple[int, ...]]:
        """Log-probabilities before temperature and penalties, the numbers a harness compares."""
        logprobs = torch.log_softmax(logits, dim=-1)
        values, ids = logprobs.topk(min(wanted, logprobs.numel()))
        top = tuple(
            (self._spell(int(token)), float(value))
            for token, value in zip(ids, values, strict=True)
        )
        return float(logprobs[token_id]), top, tuple(ids.tolist())

    def _spell(self, token_id: int) -> str:
        return str(self._model.tokenizer.decode([token_id]))


def choose_token(
    logits: torch.Tensor,
    sampling: Sampling,
    *,
    counts: Counter[int],
    generator: torch.Generator,
) -> int:
    """Pick the next token from logits f32 [vocabulary]; temperature 0 is the argmax."""
    if counts and (sampling.presence_penalty or sampling.frequency_penalty):
        seen = torch.tensor(list(counts))
        times = torch.tensor(list(counts.values()), dtype=torch.float32)
        penalty = sampling.presence_penalty + sampling.frequency_penalty * times
        logits = logits.index_add(0, seen, -penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_p >= 1:
        return int(torch.multinomial(probabilities, 1, generator=generator))
    ordered, ids = probabilities.sort(descending=True)
    # A token stays while those before it hold less than top_p, so the first one always stays.
    nucleus = ordered.cumsum(0) - ordered < sampling.top_p
    nucleus[0] = True
    ordered = torch.where(nucleus, ordered, 0)
    return int(ids[torch.multinomial(ordered, 1, generator=generator)])
