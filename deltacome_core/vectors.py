"""Quantisation of singular vectors on one symmetric grid each, with error feedback.

Everything here works on a batch of matrices side by side: many small steps cost more than few
large ones, on a GPU most of all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from deltacome_core.gptq import upper_inverse_factor

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
        covering = values.abs().amax(dim=-1) * (2 * _RANGE_MARGIN) / self.top
        return torch.where(self.full_range, covering, clipping).half().float()

    def columns(self, index: torch.Tensor) -> "VectorGrids":
        """Take one vector of each batch element: index int64 [batch, 1]."""
        return VectorGrids(
            top=self.top.gather(1, index),
            spacing=self.spacing.gather(1, index),
            full_range=self.full_range.gather(1, index),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedVectors:
    """codes uint8 and values float32 [batch, rows, cols]; scale float32 [batch, vectors]."""

    codes: torch.Tensor
    scale: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnFeedback:
    """How errors spread over columns.

    order int64 [batch, cols]; inverse float32 [batch, cols, cols] is the upper Cholesky factor of
    the inverse of the permuted Hessian.
    """

    order: torch.Tensor
    inverse: torch.Tensor


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
    inverse = torch.stack(
        [
            upper_inverse_factor(each[permutation][:, permutation], damping)
            for each, permutation in zip(hessian, order, strict=True)
        ]
    )
    return ColumnFeedback(order=order, inverse=inverse)


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
    inverse = _invert(scale)
    if feedback is None:
        codes = _encode(values, inverse[..., None], grids.top[..., None])
    else:
        codes = _walk_columns(
            values,
            feedback,
            lambda x, _column: (_encode(x, inverse, grids.top), scale, grids.top),
        )
    decoded = (codes - grids.top[..., None] / 2) * scale[..., None]
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
        scale = torch.zeros_like(grids.top)

        def encode(
            x: torch.Tensor, column: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            own = grids.columns(column)
            fitted = own.scale(x[:, None])
            scale.scatter_(1, column, fitted)
            top = own.top.expand_as(x)
            return _encode(x, _invert(fitted), top), fitted, top

        codes = _walk_columns(values, feedback, encode)
    decoded = (codes - grids.top[:, None] / 2) * scale[:, None]
    return QuantisedVectors(codes=codes.to(torch.uint8), scale=scale, values=decoded)


_Encoder = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _walk_columns(values: torch.Tensor, feedback: ColumnFeedback, encode: _Encoder) -> torch.Tensor:
    """Encode column by column, moving each error to the columns that follow.

    `encode` is given a column float32 [batch, rows] and its index int64 [batch, 1]; it returns
    codes, scale and top, which broadcast to each other. Returns codes as float32 of values' shape.
    """
    batch, rows, cols = values.shape
    order = feedback.order[:, :, None].expand(batch, cols, rows)
    # Transposed, so that a column of the paper is contiguous here.
    pending = values.mT.gather(1, order).contiguous()
    codes = torch.empty_like(pending)
    pivots = 1.0 / feedback.inverse.diagonal(dim1=1, dim2=2)
    for start in range(0, cols, _BLOCK):
        stop = min(start + _BLOCK, cols)
        block = pending[:, start:stop]
        errors = torch.empty_like(block)
        for at in range(stop - start):
            column = start + at
            x = block[:, at]
            code, scale, top = encode(x, feedback.order[:, column : column + 1])
            codes[:, column] = code
            error = (x - (code - top / 2) * scale) * pivots[:, column : column + 1]
            errors[:, at] = error
            spread = feedback.inverse[:, column, column + 1 : stop]
            block[:, at + 1 :].addcmul_(spread[:, :, None], error[:, None], value=-1)
        pending[:, stop:] -= feedback.inverse[:, start:stop, stop:].mT @ errors
    restored = torch.empty_like(codes)
    return restored.scatter_(1, order, codes).mT
