"""Symmetric grids of singular vectors: one scale each, no zero point."""

from dataclasses import dataclass

import torch

# Spacing of the uniform grid of 2^b levels around zero with the least squared error on a unit
# Gaussian (Max 1960, table II; 8 bits numerically).
_SPACING = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 8: 0.0308}
# From here on clipping costs more than spacing gains: a leading direction must lose nothing.
_FULL_RANGE_BITS = 4
# A little more than the largest value, so that its fp16 scale cannot round below it.
_RANGE_MARGIN = 1.02


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


def invert(scale: torch.Tensor) -> torch.Tensor:
    """Give 1 / scale, and 0 for a vector of zeros, which has no scale.

    Args:
        scale: float32, not negative.

    Returns:
        float32 of its shape.
    """
    return torch.where(scale > 0, 1.0 / torch.where(scale > 0, scale, 1.0), 0.0)
