"""Matrices of a delta laid out for the kernels: jobs for their factors, records that find them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from deltacome_core.layout import TILE_CODES
from deltacome_core.packed import PackedBand, PackedFactor, PackedLinear, PackedMatrix
from kernels.directory import MAX_OUTPUTS, SOURCE_HIDDEN, SOURCE_INPUT, Part, Record, Target
from kernels.fragments import (
    STEP_WORDS,
    WORD_COLUMNS,
    FragmentShape,
    WordOrder,
    count_pairs,
    count_steps,
    fill_pairs,
    order_by_bit,
    order_by_tile,
    words_of,
)
from kernels.image_jobs import JobWriter, refuse

# A length that zeros cannot reach, far below any singular value worth a code.
_LEAST_BOUND: Final = 1e-12
# Activations are rounded to whole numbers and lengths to fp32: both are far below this.
_BOUND_MARGIN: Final = 1.001


def _is_by_row(factor: PackedFactor) -> bool:
    return factor.zero is None and factor.group[1] in {0, factor.cols}


def _is_by_column(factor: PackedFactor) -> bool:
    """One scale a column, or one for all: it can be folded into what the column multiplies."""
    by_column = factor.group == (0, 1) or (factor.rows <= factor.group[0] and factor.group[1] == 1)
    return factor.zero is None and (by_column or factor.group == (0, 0))


def _check_tiles(name: str, factor: PackedFactor) -> None:
    if factor.group[1] % TILE_CODES and factor.group[1] < factor.cols:
        reason = f"a scale for {factor.group[0]} x {factor.group[1]} codes"
        raise refuse(name, reason)


def _row_lengths(factor: PackedFactor) -> npt.NDArray[np.float64]:
    """Upper limit of the length of each row, f64 [rows]."""
    most = (1 << factor.bits) - 1
    scale = factor.scale.numpy().astype(np.float64)
    if factor.zero is None:
        largest = scale * (most / 2)
    else:
        zero = factor.zero.numpy().astype(np.float64)
        largest = scale * np.maximum(zero, most - zero)
    rows = largest[:, 0] if largest.shape[1] == 1 else largest.max(axis=1)
    group = factor.group[0] or factor.rows
    spread = rows if group == 1 else rows.repeat(group)[: factor.rows]
    return spread * sqrt(factor.cols)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Band:
    """One rank band on its way: where its columns of U lie, and its limit of |h|."""

    band: PackedBand
    sigma: torch.Tensor
    order: WordOrder
    bound: float

    @property
    def words(self) -> int:
        """Words up to the last one of this band."""
        groups = words_of(self.band.rank)
        full, rest = divmod(groups - 1, STEP_WORDS)
        bits = self.band.u.bits
        return self.order.first + full * self.order.tile + rest * self.order.group + bits


def _limit_hidden(band: PackedBand, sigma: torch.Tensor) -> float:
    """Upper limit of |h| times what the highest bit of U is worth, for an input of length 1."""
    lengths = _row_lengths(band.v) * sigma.numpy()
    if _is_by_column(band.u):
        lengths = lengths * band.u.scale.numpy().reshape(-1).astype(np.float64)
    worth = 1 << (band.u.bits - 1)
    return max(_LEAST_BOUND, float(lengths.max()) * _BOUND_MARGIN) * worth


def _order_bands(bands: Sequence[tuple[PackedBand, torch.Tensor]]) -> list[list[_Band]]:
    """Bands that share a record: all with a scale a column; each other one has its own."""
    shared: list[_Band] = []
    found: list[list[_Band]] = []
    first = 0
    for band, sigma in bands:
        bits, groups = band.u.bits, words_of(band.rank)
        bound = _limit_hidden(band, sigma)
        if _is_by_column(band.u) or _is_by_row(band.u):
            tile, steps = STEP_WORDS * bits, 0
        else:
            tile_steps = -(-bits * min(groups, STEP_WORDS) // STEP_WORDS)
            tile, steps = STEP_WORDS * tile_steps, count_steps(band.rank) * tile_steps
        start = first if _is_by_column(band.u) else 0
        order = WordOrder(first=start, tile=tile, group=bits, bit=1, steps=steps)
        one = _Band(band=band, sigma=sigma, order=order, bound=bound)
        if _is_by_column(band.u):
            shared.append(one)
            first = one.words
        else:
            found.append([one])
    return ([shared] if shared else []) + found


def _settle(chosen: list[_Band]) -> list[_Band]:
    """Bands of one record with the steps and the limit that they share."""
    steps = max(band.order.steps for band in chosen) or -(-chosen[-1].words // STEP_WORDS)
    steps = fill_pairs(steps)
    bound = max(band.bound for band in chosen)
    return [replace(band, order=replace(band.order, steps=steps), bound=bound) for band in chosen]


def _add_first(writer: JobWriter, name: str, one: _Band, target: Target) -> Record:
    """Record of V of one band."""
    v, u = one.band.v, one.band.u
    by_row = _is_by_row(v)
    scales = [(v.scale, v.group[0] or v.rows)] if by_row else []
    if _is_by_column(one.band.u):
        scales.append((u.scale, 1 if u.scale.numel() > 1 else u.cols))
    factors = writer.add_factors(v.rows, one.sigma, scales)
    record = _add_product(writer, name, v, factors=factors, by_row=by_row)
    worth = 1 << (v.bits + u.bits - 2)
    return replace(record, bound=one.bound / worth, target=target)


def _add_product(
    writer: JobWriter, name: str, factor: PackedFactor, *, factors: int, by_row: bool
) -> Record:
    """Record of a factor whose source are plain columns."""
    order_by = order_by_bit if by_row else order_by_tile
    order = order_by(columns=factor.cols, bits=factor.bits)
    shape = FragmentShape(factor.rows, order.steps)
    codes = writer.reserve(shape.size_bytes)
    writer.add_codes(factor, codes, order)
    groups = 0
    if not by_row:
        _check_tiles(name, factor)
        groups = writer.add_groups(factor)
    return Record(
        readings=factor.bits,
        codes=codes,
        rows=factor.rows,
        row_blocks=shape.row_blocks,
        steps=order.steps // factor.bits if by_row else count_steps(factor.cols),
        factors=factors,
        groups=groups,
        bound=1.0,
        first_pair=0,
        tile_steps=factor.bits,
        bits=factor.bits,
    )


def _add_last(writer: JobWriter, matrix: PackedMatrix, bands: list[_Band], *, pair: int) -> Record:
    """Record of U of all bands that share one."""
    order, last = bands[0].order, bands[-1].band.u
    shape = FragmentShape(matrix.out_features, order.steps)
    codes = writer.reserve(shape.size_bytes)
    for one in bands:
        writer.add_codes(one.band.u, codes, one.order)
    factors = groups = 0
    if not _is_by_column(bands[0].band.u):
        if _is_by_row(last):
            scales = [(last.scale, last.group[0] or last.rows)]
            factors = writer.add_factors(last.rows, None, scales)
        else:
            _check_tiles(matrix.name, last)
            groups = writer.add_groups(last)
    return Record(
        readings=1,
        codes=codes,
        rows=matrix.out_features,
        row_blocks=shape.row_blocks,
        steps=count_steps(last.cols) * (order.tile // STEP_WORDS) if groups else order.steps,
        factors=factors,
        groups=groups,
        bound=bands[0].bound,
        first_pair=pair,
        tile_steps=order.tile // STEP_WORDS,
        bits=last.bits,
    )


def _add_bands(
    writer: JobWriter, matrix: PackedMatrix, *, number: int, pair: int, row: int
) -> tuple[list[Record], list[Record]]:
    """Records of V and of U of a matrix whose hidden values begin at `pair`, its rows at `row`."""
    shrink: list[Record] = []
    expand: list[Record] = []
    first = column = 0
    ranked = []
    for band in matrix.bands:
        ranked.append((band, matrix.sigma[first : first + band.rank]))
        first += band.rank
    for record, chosen in enumerate(_order_bands(ranked)):
        bands = _settle(chosen)
        pairs = count_pairs(bands[0].order.steps)
        for one in bands:
            ends = pairs * 2 * STEP_WORDS if one is bands[-1] else one.words
            target = Target(
                first=pair * 2 * STEP_WORDS + one.order.first,
                tile=one.order.tile,
                bits=one.band.u.bits,
                zeros=ends - one.words,
                row=row + column,
                column=column,
                part=number,
                record=record,
            )
            shrink.append(_add_first(writer, matrix.name, one, target))
            column += words_of(one.band.rank) * WORD_COLUMNS
        expand.append(_add_last(writer, matrix, bands, pair=pair))
        pair += pairs
    return shrink, expand


def add_matrix(
    writer: JobWriter, matrix: PackedLinear, *, number: int, first_row: int, pair: int, row: int
) -> tuple[Part, list[Record]]:
    """Jobs of one matrix of a site.

    Args:
        writer: of the delta.
        matrix: on the CPU.
        number: of the matrix among those of the site.
        first_row: its first output among those of the site.
        pair: its first pair of hidden values.
        row: its first row among the right factors of the site, as `unfold` writes them.

    Returns:
        The part, and its records of the first stage.

    Raises:
        UserError: arena_recipe_unknown.
    """
    shrink: list[Record] = []
    source = SOURCE_HIDDEN
    if isinstance(matrix, PackedMatrix):
        shrink, expand = _add_bands(writer, matrix, number=number, pair=pair, row=row)
    else:
        source = SOURCE_INPUT
        factor = matrix.factor
        by_row = _is_by_row(factor)
        scales = [(factor.scale, factor.group[0] or factor.rows)]
        factors = writer.add_factors(factor.rows, None, scales) if by_row else 0
        record = _add_product(writer, matrix.name, factor, factors=factors, by_row=by_row)
        expand = [replace(record, bound=float(1 << (factor.bits - 1)))]
    if len(expand) > MAX_OUTPUTS:
        raise refuse(matrix.name, f"{len(expand)} rank bands with scales of their own")
    part = Part(
        first_row=first_row,
        rows=matrix.out_features,
        source=source,
        expand=tuple(expand),
    )
    return part, shrink
