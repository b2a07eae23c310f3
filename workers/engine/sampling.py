"""Choosing the next tokens of many answers at once."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.streams import send


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
class Draw:
    """What one row needs to be chosen: its settings, its tokens so far, its own chance."""

    sampling: Sampling
    counts: Counter[int]
    generator: torch.Generator

    @property
    def has_penalty(self) -> bool:
        return bool(self.sampling.presence_penalty or self.sampling.frequency_penalty)


def choose_tokens(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Pick one token a row; temperature 0 is the argmax.

    A row is drawn by one uniform number of its own generator, so neither its company nor the
    device changes the draw.

    Args:
        logits: f32 [rows, vocabulary].
        draws: one a row.

    Returns:
        int64 [rows] on the device of the logits.
    """
    if any(draw.counts and draw.has_penalty for draw in draws):
        # The logits themselves are still to be scored.
        logits = logits.clone()
        for row, draw in enumerate(draws):
            _penalise(logits[row], draw)
    chosen = logits.argmax(dim=-1)
    drawn = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if drawn:
        rows = send(np.array(drawn), logits.device)
        chosen[rows] = _draw_rows(logits[rows], [draws[row] for row in drawn])
    return chosen


def _penalise(logits: torch.Tensor, draw: Draw) -> None:
    sampling, counts = draw.sampling, draw.counts
    if not counts or not draw.has_penalty:
        return
    seen = send(np.array(list(counts), dtype=np.int64), logits.device)
    times = send(np.array(list(counts.values()), dtype=np.float32), logits.device)
    penalty = sampling.presence_penalty + sampling.frequency_penalty * times
    logits.index_add_(0, seen, -penalty)


def _draw_rows(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    def column(values: list[float]) -> torch.Tensor:
        return send(np.array(values, dtype=np.float32), logits.device)[:, None]

    heat = column([draw.sampling.temperature for draw in draws])
    chance = column([float(torch.rand(1, generator=draw.generator)) for draw in draws])
    weights = torch.softmax(logits / heat, dim=-1)
    narrow = [row for row, draw in enumerate(draws) if draw.sampling.top_p < 1]
    if narrow:
        rows = send(np.array(narrow), logits.device)
        limit = column([draws[row].sampling.top_p for row in narrow])
        weights[rows] = _keep_nucleus(weights[rows], limit)
    return _invert(weights, chance)


def _keep_nucleus(weights: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Take the weight from tokens outside the likeliest that together hold `limit`."""
    ordered, ids = weights.sort(dim=-1, descending=True)
    # A token stays while those before it hold less than the limit, so the first one always stays.
    outside = ordered.cumsum(-1) - ordered >= limit
    outside[:, 0] = False
    # In the order of the vocabulary, as rows without a limit are: the same chance, the same token.
    return weights.masked_fill(torch.empty_like(outside).scatter_(1, ids, outside), 0)


def _invert(weights: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Find the first token at which the running sum passes the chance's share of the whole."""
    sums = weights.cumsum(-1)
    whole = sums[:, -1:]
    found = torch.searchsorted(sums, (chance * whole).contiguous(), right=True)[:, 0]
    # A product that rounds up to the whole must not fall on a tail without weight.
    return found.minimum(torch.searchsorted(sums, whole.contiguous())[:, 0])
