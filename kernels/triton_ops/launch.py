"""What the four launchers share: the arguments of a packed factor and its constants."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from deltacome_core.packed import PackedBand, PackedFactor, PackedMatrix


class FactorArguments(NamedTuple):
    """A packed factor in the order in which every kernel takes it."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    n_rows: int
    n_cols: int
    row_words: int
    group_rows: int
    group_cols: int
    row_groups: int


def factor_arguments(factor: PackedFactor) -> FactorArguments:
    """Kernel arguments of `factor`.

    Args:
        factor: codes int32 [rows, words], scale fp16 [row groups, column groups], zero uint8 or
            None.

    Returns:
        Its tensors and sizes; a group of 0 becomes the whole dimension, an absent zero the scale,
        which no kernel reads as a zero.
    """
    scale = factor.scale.contiguous()
    group_rows, group_cols = factor.group
    return FactorArguments(
        codes=factor.codes.contiguous(),
        scale=scale,
        zero=scale if factor.zero is None else factor.zero.contiguous(),
        n_rows=factor.rows,
        n_cols=factor.cols,
        row_words=factor.codes.shape[1],
        group_rows=group_rows or factor.rows,
        group_cols=group_cols or factor.cols,
        row_groups=scale.shape[1],
    )


def enumerate_bands(matrix: PackedMatrix) -> Iterator[tuple[int, PackedBand]]:
    """Bands of `matrix`, each with the number of its first singular value."""
    first = 0
    for band in matrix.bands:
        yield first, band
        first += band.rank


def unit_columns(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix` [m, n] itself where its columns are adjacent in memory, otherwise a copy."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def running_sums(out: torch.Tensor, *, n_bands: int) -> list[torch.Tensor]:
    """Where each band writes its sum with all bands before it: fp32, and `out` for the last.

    Args:
        out: [m, n] of the last band, which rounds once.
        n_bands: Bands of the matrix.

    Returns:
        n_bands tensors [m, n]; none but `out` is a second one where `out` is fp32 itself.
    """
    if out.dtype == torch.float32 or n_bands == 1:
        return [out] * n_bands
    between = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    return [*[between] * (n_bands - 1), out]
