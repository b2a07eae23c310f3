"""Quantisation of singular vectors on one symmetric grid each, with error feedback.

Everything here works on a batch of matrices side by side: many small steps cost more than few
large ones, on a GPU most of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from deltacome_core.gptq import upper_inverse_factor
from deltacome_core.grids import VectorGrids, invert
from deltacome_core.walk import ColumnFeedback, Walks, walk_columns, walk_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedVectors:
    """codes uint8 and values float32 [..., rows, cols]; scale float32 [..., vectors]."""

    codes: torch.Tensor
    scale: torch.Tensor
    values: torch.Tensor


def prepare_columns(hessian: torch.Tensor, *, damping: float) -> ColumnFeedback:
    """Order columns by falling diagonal and factor the inverse Hessian.

    Args:
        hessian: float32 [batch, cols, cols], symmetric positive semidefinite.
        damping: added to the diagonal, as a share of its mean; raised until it suffices.

    Returns:
        The feedback of each element of the batch.

    Raises:
        InternalError: a Hessian is not finite.

    Source: GPTQ (arXiv 2210.17323), act-order; free here, since no scale belongs to a column group.
    """
    order = torch.argsort(hessian.diagonal(dim1=1, dim2=2), dim=1, descending=True, stable=True)
    factors = [
        upper_inverse_factor(each, damping, order=own)
        for each, own in zip(hessian, order, strict=True)
    ]
    # A stack of one is a view: the factor of a wide layer takes gigabytes.
    spread = factors[0][None] if len(factors) == 1 else torch.stack(factors)
    spread.div_(spread.diagonal(dim1=1, dim2=2)[..., None].clone())
    return ColumnFeedback(order=order, spread=spread)


def _encode(x: torch.Tensor, inverse: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """Give the nearest codes; the levels are (code - top / 2) * scale."""
    code = torch.floor(torch.addcmul((top + 1) / 2, x, inverse))
    return torch.clamp(code, torch.zeros_like(top), top)


def quantise_rows(
    values: torch.Tensor,
    bits: torch.Tensor,
    feedback: ColumnFeedback | None,
    *,
    headroom: float = 1.0,
    walks: Walks | None = None,
) -> QuantisedVectors:
    """Quantise V: each row on a grid of its own.

    Args:
        values: float32 [batch, rows, cols].
        bits: int64 [batch, rows].
        feedback: of the Hessian of the columns; None rounds to the nearest.
        headroom: see VectorGrids.scale; with feedback a value may grow before its turn.
        walks: of other matrices, to be used again.

    Returns:
        Codes, one scale per row and the decoded values.

    Source: GPTQ (arXiv 2210.17323), algorithm 1.
    """
    grids = VectorGrids.of(bits)
    scale = grids.scale(values, headroom=headroom if feedback is not None else 1.0)
    inverse, top = invert(scale), grids.top
    if feedback is None:
        codes = _encode(values, inverse[..., None], top[..., None])
    else:
        levels = torch.addcmul(top[..., None] / 2, values, inverse[..., None])
        codes = walk_rows(levels, top, feedback, walks or Walks())
    decoded = (codes - top[..., None] / 2) * scale[..., None]
    return QuantisedVectors(codes=codes.to(torch.uint8), scale=scale, values=decoded)


def quantise_columns(
    values: torch.Tensor,
    bits: torch.Tensor,
    feedback: ColumnFeedback | None,
    *,
    walks: Walks | None = None,
) -> QuantisedVectors:
    """Quantise U: each column on a grid of its own, fitted once all its corrections have arrived.

    Args:
        values: float32 [batch, rows, cols].
        bits: int64 [batch, cols].
        feedback: of the Hessian of the columns; None rounds to the nearest.
        walks: of other matrices, to be used again.

    Returns:
        Codes, one scale per column and the decoded values.

    Source: GPTQ (arXiv 2210.17323), algorithm 1; all bands in one pass, so that later vectors take
        up the errors of earlier ones whatever their bits.
    """
    grids = VectorGrids.of(bits)
    if feedback is None:
        scale = grids.scale(values.mT)
        codes = _encode(values, invert(scale)[:, None], grids.top[:, None])
    else:
        codes, fitted = walk_columns(
            values, grids.ordered(feedback.order), feedback, walks or Walks()
        )
        scale = torch.empty_like(grids.top).scatter_(1, feedback.order, fitted)
    decoded = (codes - grids.top[:, None] / 2) * scale[:, None]
    return QuantisedVectors(codes=codes.to(torch.uint8), scale=scale, values=decoded)


def quantise_side_by_side(
    lefts: Sequence[torch.Tensor],
    bits: Sequence[torch.Tensor],
    feedback: Sequence[ColumnFeedback] | None,
    *,
    walks: Walks | None = None,
) -> list[QuantisedVectors]:
    """Quantise the U of several matrices, those of as many rows in one pass.

    Args:
        lefts: float32 [rows, cols] each.
        bits: int64 [cols] each.
        feedback: of each, a batch of one; None rounds to the nearest.
        walks: of other matrices, to be used again.

    Returns:
        codes and values [rows, cols] and scale [cols] of each, in order.
    """
    made: dict[int, QuantisedVectors] = {}
    for n_rows in dict.fromkeys(len(left) for left in lefts):
        places = [at for at, left in enumerate(lefts) if len(left) == n_rows]
        widest = max(len(bits[at]) for at in places)
        missing = {at: (0, widest - len(bits[at])) for at in places}
        batch = quantise_columns(
            torch.stack([pad(lefts[at], missing[at]) for at in places]),
            torch.stack([pad(bits[at], missing[at], value=1) for at in places]),
            _stack_feedback([feedback[at] for at in places], widest) if feedback else None,
            walks=walks,
        )
        for number, at in enumerate(places):
            some = slice(len(bits[at]))
            made[at] = QuantisedVectors(
                codes=batch.codes[number, :, some],
                scale=batch.scale[number, some],
                values=batch.values[number, :, some],
            )
    return [made[at] for at in range(len(lefts))]


def _stack_feedback(items: Sequence[ColumnFeedback], cols: int) -> ColumnFeedback:
    """Put batches of one side by side; columns that one lacks come last and spread nothing."""
    orders, spreads = [], []
    for item in items:
        have = item.order.shape[1]
        more = torch.arange(have, cols, device=item.order.device)
        orders.append(torch.cat([item.order[0], more]))
        spread = torch.eye(cols, device=item.spread.device)
        spread[:have, :have] = item.spread[0]
        spreads.append(spread)
    return ColumnFeedback(order=torch.stack(orders), spread=torch.stack(spreads))
