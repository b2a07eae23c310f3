"""Quantisation of singular vectors on one symmetric grid each, with error feedback.

Everything here works on a batch of matrices side by side: many small steps cost more than few
large ones, on a GPU most of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import pad

from deltacome_core.gptq import upper_inverse_factor
from deltacome_core.replay import record

# Spacing of the uniform grid of 2^b levels around zero with the least squared error on a unit
# Gaussian (Max 1960, table II; 8 bits numerically).
_SPACING = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 8: 0.0308}
# From here on clipping costs more than spacing gains: a leading direction must lose nothing.
_FULL_RANGE_BITS = 4
# A little more than the largest value, so that its fp16 scale cannot round below it.
_RANGE_MARGIN = 1.02
# Columns whose corrections are applied to the rest at once (GPTQ's lazy batches).
_BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorGrids:
    """Bit widths of the vectors of a batch: top = 2^b - 1 and the spacing of a unit Gaussian.

    top, spacing float32 [batch, vectors]; full_range bool [batch, vectors].
    """

    top: torch.Tensor
    spacing: torch.Tensor
    full_range: torch.Tensor

    @classmethod
    def of(cls, bits: torch.Tensor) -> "VectorGrids":
        """Look the grids up.

        Args:
            bits: int64 [batch, vectors], each 1, 2, 3, 4 or 8.

        Returns:
            The grids, on the device of bits.
        """
        table = torch.zeros(max(_SPACING) + 1, device=bits.device)
        for width, spacing in _SPACING.items():
            table[width] = spacing
        return cls(
            top=2.0 ** bits.float() - 1,
            spacing=table[bits],
            full_range=bits >= _FULL_RANGE_BITS,
        )

    def scale(self, values: torch.Tensor, *, headroom: float = 1.0) -> torch.Tensor:
        """Fit one scale per vector, as float16 will hold it.

        Args:
            values: float32 [batch, vectors, n].
            headroom: factor on the scale of vectors that may clip.

        Returns:
            float32 [batch, vectors].
        """
        size = torch.linalg.vector_norm(values, dim=-1) * values.shape[-1] ** -0.5
        clipping = size * self.spacing * headroom
        largest = torch.linalg.vector_norm(values, ord=torch.inf, dim=-1)
        covering = largest * (2 * _RANGE_MARGIN) / self.top
        return torch.where(self.full_range, covering, clipping).half().float()

    def ordered(self, order: torch.Tensor) -> "VectorGrids":
        """Put the vectors in another order: int64 [batch, vectors]."""
        return VectorGrids(
            top=self.top.gather(1, order),
            spacing=self.spacing.gather(1, order),
            full_range=self.full_range.gather(1, order),
        )

    def columns(self, start: int, stop: int) -> "VectorGrids":
        """Take a run of vectors of each batch element; views."""
        return VectorGrids(
            top=self.top[:, start:stop],
            spacing=self.spacing[:, start:stop],
            full_range=self.full_range[:, start:stop],
        )

    def copy_from(self, other: "VectorGrids") -> None:
        """Take over the numbers of as many vectors."""
        self.top.copy_(other.top)
        self.spacing.copy_(other.spacing)
        self.full_range.copy_(other.full_range)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedVectors:
    """codes uint8 and values float32 [..., rows, cols]; scale float32 [..., vectors]."""

    codes: torch.Tensor
    scale: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnFeedback:
    """How errors spread over columns.

    order int64 [batch, cols]; spread float32 [batch, cols, cols] is the upper Cholesky factor of
    the inverse of the permuted Hessian, each row divided by its diagonal: what an error of one
    takes from each later column.
    """

    order: torch.Tensor
    spread: torch.Tensor


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


def _invert(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, 1.0 / torch.where(scale > 0, scale, 1.0), 0.0)


def quantise_rows(
    values: torch.Tensor,
    bits: torch.Tensor,
    feedback: ColumnFeedback | None,
    *,
    headroom: float = 1.0,
) -> QuantisedVectors:
    """Quantise V: each row on a grid of its own.

    Args:
        values: float32 [batch, rows, cols].
        bits: int64 [batch, rows].
        feedback: of the Hessian of the columns; None rounds to the nearest.
        headroom: see VectorGrids.scale; with feedback a value may grow before its turn.

    Returns:
        Codes, one scale per row and the decoded values.

    Source: GPTQ (arXiv 2210.17323), algorithm 1.
    """
    grids = VectorGrids.of(bits)
    scale = grids.scale(values, headroom=headroom if feedback is not None else 1.0)
    inverse, top = _invert(scale), grids.top
    if feedback is None:
        codes = _encode(values, inverse[..., None], top[..., None])
    else:
        codes = _walk_columns(
            torch.addcmul(top[..., None] / 2, values, inverse[..., None]),
            feedback,
            _CodesOfRows(top),
        )
    decoded = (codes - top[..., None] / 2) * scale[..., None]
    return QuantisedVectors(codes=codes.to(torch.uint8), scale=scale, values=decoded)


def quantise_columns(
    values: torch.Tensor, bits: torch.Tensor, feedback: ColumnFeedback | None
) -> QuantisedVectors:
    """Quantise U: each column on a grid of its own, fitted once all its corrections have arrived.

    Args:
        values: float32 [batch, rows, cols].
        bits: int64 [batch, cols].
        feedback: of the Hessian of the columns; None rounds to the nearest.

    Returns:
        Codes, one scale per column and the decoded values.

    Source: GPTQ (arXiv 2210.17323), algorithm 1; all bands in one pass, so that later vectors take
        up the errors of earlier ones whatever their bits.
    """
    grids = VectorGrids.of(bits)
    if feedback is None:
        scale = grids.scale(values.mT)
        codes = _encode(values, _invert(scale)[:, None], grids.top[:, None])
    else:
        encoder = _CodesOfColumns(grids.ordered(feedback.order))
        codes = _walk_columns(values, feedback, encoder)
        scale = torch.empty_like(grids.top).scatter_(1, feedback.order, encoder.scale)
    decoded = (codes - grids.top[:, None] / 2) * scale[:, None]
    return QuantisedVectors(codes=codes.to(torch.uint8), scale=scale, values=decoded)


def quantise_side_by_side(
    lefts: Sequence[torch.Tensor],
    bits: Sequence[torch.Tensor],
    feedback: Sequence[ColumnFeedback] | None,
) -> list[QuantisedVectors]:
    """Quantise the U of several matrices, those of as many rows in one pass.

    Args:
        lefts: float32 [rows, cols] each.
        bits: int64 [cols] each.
        feedback: of each, a batch of one; None rounds to the nearest.

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


class _CodesOfRows:
    """Codes of V, whose values come in units of their row's scale, counted from its lowest level.

    The error of a row stays in the row, so it needs no other unit.
    """

    def __init__(self, top: torch.Tensor) -> None:
        self._top, self._zero = top, torch.zeros_like(top)

    def start_block(self, start: int, stop: int) -> None:
        """Nothing to prepare: the rows are the same in every block."""

    def end_block(self, start: int, stop: int) -> None:
        """Nothing to keep."""

    def encode(
        self,
        x: torch.Tensor,
        at: int,  # noqa: ARG002 - every column is alike
        *,
        code: torch.Tensor,
        error: torch.Tensor,
    ) -> None:
        torch.round(x, out=code)
        torch.clamp(code, self._zero, self._top, out=code)
        torch.sub(x, code, out=error)


class _CodesOfColumns:
    """Codes of U: the grid of a column is fitted when its turn comes.

    scale float32 [batch, cols] in the order of the walk.
    """

    def __init__(self, grids: VectorGrids) -> None:
        self._grids = grids
        self.scale = torch.zeros_like(grids.top)
        self._block = VectorGrids.of(grids.top.new_ones(len(grids.top), _BLOCK, dtype=torch.int64))
        self._scale = torch.zeros_like(self._block.top)
        self._zero = torch.zeros_like(self._block.top[:, :1])

    def start_block(self, start: int, stop: int) -> None:
        self._block.columns(0, stop - start).copy_from(self._grids.columns(start, stop))

    def end_block(self, start: int, stop: int) -> None:
        self.scale[:, start:stop] = self._scale[:, : stop - start]

    def encode(self, x: torch.Tensor, at: int, *, code: torch.Tensor, error: torch.Tensor) -> None:
        grid, scale = self._block.columns(at, at + 1), self._scale[:, at : at + 1]
        scale.copy_(grid.scale(x[:, None]))
        places = torch.addcmul(grid.top / 2, x, _invert(scale))
        torch.round(places, out=code)
        torch.clamp(code, self._zero, grid.top, out=code)
        torch.mul(places - code, scale, out=error)


class _Encoder(Protocol):
    """Gives the codes of one column float32 [batch, rows] after another.

    `encode` writes code and error of the column `at` of its block, both of x's shape, in place.
    """

    def start_block(self, start: int, stop: int) -> None: ...
    def end_block(self, start: int, stop: int) -> None: ...
    def encode(
        self, x: torch.Tensor, at: int, *, code: torch.Tensor, error: torch.Tensor
    ) -> None: ...


class _Block:
    """The columns whose turn it is, [batch, columns, rows], in memory that stays where it is."""

    def __init__(self, like: torch.Tensor, encoder: _Encoder) -> None:
        batch, _, rows = like.shape
        self.values, self.codes, self.errors = (
            like.new_zeros((batch, _BLOCK, rows)) for _ in range(3)
        )
        self.spread = like.new_zeros((batch, _BLOCK, _BLOCK))
        self._encoder = encoder
        self._run = record(self._steps, like.device)

    def _steps(self) -> None:
        for at in range(_BLOCK):
            error = self.errors[:, at]
            self._encoder.encode(self.values[:, at], at, code=self.codes[:, at], error=error)
            spread = self.spread[:, at, at + 1 :, None]
            self.values[:, at + 1 :].addcmul_(spread, error[:, None], value=-1)

    def walk(self, values: torch.Tensor, spread: torch.Tensor) -> int:
        """Do the columns values [batch, n, rows] with spread [batch, n, n]; return n."""
        n = values.shape[1]
        if n < _BLOCK:
            self.values.zero_()
            self.spread.zero_()
        self.values[:, :n] = values
        self.spread[:, :n, :n] = spread
        self._run()
        return n


def _walk_columns(
    values: torch.Tensor, feedback: ColumnFeedback, encoder: _Encoder
) -> torch.Tensor:
    """Encode column by column, moving each error to the columns that follow.

    Returns codes as float32 of values' shape [batch, rows, cols].
    """
    batch, rows, cols = values.shape
    order = feedback.order[:, :, None].expand(batch, cols, rows)
    # Transposed, so that a column of the paper is contiguous here.
    pending = values.mT.gather(1, order)
    codes = torch.empty_like(pending)
    block = _Block(pending, encoder)
    for start in range(0, cols, _BLOCK):
        stop = min(start + _BLOCK, cols)
        encoder.start_block(start, stop)
        n = block.walk(pending[:, start:stop], feedback.spread[:, start:stop, start:stop])
        encoder.end_block(start, stop)
        codes[:, start:stop] = block.codes[:, :n]
        if stop < cols:
            spread = feedback.spread[:, start:stop, stop:].mT
            pending[:, stop:].baddbmm_(spread, block.errors[:, :n], alpha=-1)
    return pending.scatter_(1, order, codes).mT
