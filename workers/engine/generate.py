"""One answer in the making: which tokens it feeds next, and what becomes of those it is given."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from workers.engine.sampling import Draw, Sampling
from workers.engine.text import TextStream

__all__ = ["Event", "Failure", "Finish", "Piece", "Sampling", "Sequence", "ServedModel"]

# Seeds that lie side by side must not share draws with the choices of each other.
_CHOICE_STRIDE = 0x9E3779B97F4A7C15


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
    def tokenizer(self) -> Any: ...
    @property
    def eos_ids(self) -> frozenset[int]: ...
    @property
    def executor(self) -> Any: ...
    @property
    def slot(self) -> int: ...
    @property
    def key(self) -> str: ...


class Sequence:
    """The state of one answer; the scheduler's thread owns it, `cancel` may be called by any.

    `tenant` is who shares the engine's time with others; by default that is the model.
    `tokens` are prompt and answer so far, of which `fed` are in the cache, on `pages`. An answer
    that loses its pages to others feeds its tokens again later and goes on as if nothing was.
    """

    def __init__(
        self,
        model: ServedModel,
        prompt: tuple[int, ...],
        *,
        sampling: Sampling,
        max_tokens: int,
        score_prompt: bool,
        prefill_chunk: int | None = None,
        emit: Callable[[Event], None],
        tenant: str | None = None,
    ) -> None:
        # How much of a prompt is read at once is the scheduler's business now.
        del prefill_chunk
        self.model = model
        self.tenant = model.key if tenant is None else tenant
        self.tokens = list(prompt)
        self.fed = 0
        self.pages: list[int] = []
        # Names of its full pages, and how many of them the pool was told.
        self.page_keys: list[bytes] = []
        self.n_named = 0
        # What an executor without pages keeps instead.
        self.cache: Any = None
        self.cancelled = False
        self.finished = False
        self.submitted_s = time.monotonic()
        self._prompt_tokens = len(prompt)
        self._sampling = sampling
        self._left = max_tokens
        self._scored = 0 if score_prompt else len(prompt)
        self._emit = emit
        self._counts: Counter[int] = Counter()
        self._text = TextStream(model.tokenizer, sampling.stop)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            # 64 bits without a sign are what a generator takes.
            self._generator.manual_seed((sampling.seed + sampling.choice * _CHOICE_STRIDE) % 2**63)

    @property
    def max_length(self) -> int:
        """Most tokens it can come to hold in the cache: the last one chosen is never fed."""
        return len(self.tokens) + max(0, self._left - 1)

    @property
    def unfed(self) -> int:
        return len(self.tokens) - self.fed

    @property
    def is_decoding(self) -> bool:
        return self.fed > 0 and self.unfed == 1

    @property
    def scores_prompt(self) -> bool:
        """Whether each token of the prompt has to be read, since its chance is asked for."""
        return self._scored < self._prompt_tokens

    @property
    def draw(self) -> Draw:
        return Draw(sampling=self._sampling, counts=self._counts, generator=self._generator)

    @property
    def has_more(self) -> bool:
        """Whether a token follows the one that is chosen now, unless that one ends the answer."""
        return self._left > 1

    @property
    def needs_its_tokens(self) -> bool:
        """Whether the next token depends on the last ones by more than their keys and values."""
        return bool(self._sampling.presence_penalty or self._sampling.frequency_penalty)

    def go_on_unseen(self) -> None:
        """Take note that a token was fed which is chosen, but not read yet."""
        self.fed += 1

    def cancel(self) -> None:
        self.cancelled = True

    def fail(self, error: Exception) -> None:
        self.finished = True
        self._emit(Failure(error=error))

    def rows_wanted(self, count: int) -> int:
        """Of the next `count` tokens, how many of the last must come with logits."""
        if self.scores_prompt:
            return count
        return int(count == self.unfed)

    def advance(self, logits: torch.Tensor, count: int) -> bool:
        """Take note that `count` tokens were fed.

        Args:
            logits: f32 [rows_wanted(count), vocabulary].
            count: tokens that are in the cache now and were not before.

        Returns:
            Whether the next token is to be chosen from the last row.
        """
        first = self.fed
        self.fed += count
        if self.scores_prompt:
            self._score_prompt(logits, first)
        if self.unfed:
            return False
        if self._left == 0:
            self._finish("length")
            return False
        return True

    def forget(self) -> None:
        """Lose everything in the cache; the tokens stay."""
        self.fed = self.n_named = 0
        self.pages = []
        self.cache = None

    def take(self, token_id: int, logits: torch.Tensor) -> Callable[[], None]:
        """Append a chosen token.

        Args:
            token_id: the token.
            logits: f32 [vocabulary] it was chosen from.

        Returns:
            The rest, which may wait until the next step runs: to spell, score and send the token.
        """
        self.tokens.append(token_id)
        self._counts[token_id] += 1
        self._left -= 1
        ends = token_id in self.model.eos_ids
        is_last = ends or self._left == 0
        self.finished = is_last

        def deliver() -> None:
            if self._text.stopped:
                return
            text = "" if ends else self._text.push(token_id)
            self._emit(self._piece(token_id, logits, text=text))
            if ends or self._text.stopped:
                self._finish("stop")
            elif is_last:
                self._finish("length")

        return deliver

    def _score_prompt(self, logits: torch.Tensor, first: int) -> None:
        if self._scored == 0:
            self._emit(self._piece(self.tokens[0], None))
            self._scored = 1
        last = min(self.fed + 1, self._prompt_tokens)
        for at in range(self._scored, last):
            self._emit(self._piece(self.tokens[at], logits[at - 1 - first]))
        self._scored = max(self._scored, last)

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
        return str(self.model.tokenizer.decode([token_id]))
