"""Jobs that put the factors of a delta in operand order, and records that say where they lie."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from deltacome_core.errors import UserError
from deltacome_core.layout import TILE_CODES
from deltacome_core.packed import PackedBand, PackedFactor, PackedLinear, PackedMatrix
from kernels.directory import MAX_OUTPUTS, SOURCE_HIDDEN, SOURCE_INPUT, Part, Record, Target
from kernels.fragments import (
    STEP_WORDS,
    UNIT_BYTES,
    WORD_COLUMNS,
    FragmentShape,
    WordOrder,
    count_pairs,
    count_steps,
    order_by_bit,
    order_by_tile,
    words_of,
)

JOB_FIELDS: Final = 16
CODES_JOB: Final = 0
FACTORS_JOB: Final = 1
GROUPS_JOB: Final = 2
PIECE_ALIGNMENT_BYTES: Final = 16
# A length that zeros cannot reach, far below any singular value worth a code.
_LEAST_BOUND: Final = 1e-12
# Activations are rounded to whole numbers and lengths to fp32: both are far below this.
_BOUND_MARGIN: Final = 1.001
_FEW_PER_JOB: Final = [[0] * (JOB_FIELDS - n) for n in range(JOB_FIELDS + 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What a site takes: `n_bytes` of bytes low .. high of the source, jobs up to last_job."""

    low: int
    high: int
    n_bytes: int
    last_job: int


def refuse(name: str, reason: str) -> UserError:
    """Say that no kernel reads a delta of this kind."""
    return UserError("arena_recipe_unknown", name=name, reason=reason)


def align_piece(size_bytes: int) -> int:
    """The next place at which a piece of the source may begin."""
    return -(-size_bytes // PIECE_ALIGNMENT_BYTES) * PIECE_ALIGNMENT_BYTES


@dataclass(slots=True)
class JobWriter:
    """Jobs of a delta, the room they take in a slab, and the bytes they read.

    memory: u8 on the CPU; a piece that lies in it is read where it is, at its own place. All others
    are pieces to be copied, at places from `memory_bytes` on.
    """

    memory: torch.Tensor | None = None
    pieces: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    slab_bytes: int = UNIT_BYTES
    jobs: list[list[int]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    source_bytes: int = 0
    _address: int = 0
    _memory_bytes: int = 0
    _low: int = -1
    _high: int = 0
    _n_bytes: int = 0

    def __post_init__(self) -> None:
        if self.memory is not None:
            self._address = self.memory.data_ptr()
            self._memory_bytes = len(self.memory)
        self.source_bytes = self.memory_bytes

    @property
    def memory_bytes(self) -> int:
        """Where the memory ends, and with it the places that need no copy."""
        return align_piece(self._memory_bytes)

    def end_site(self) -> None:
        """Note what was placed since the site before."""
        if self._low >= 0:
            self.spans.append(
                Span(
                    low=self._low,
                    high=self._high,
                    n_bytes=self._n_bytes,
                    last_job=len(self.jobs),
                )
            )
        self._low, self._high, self._n_bytes = -1, 0, 0

    def place(self, array: torch.Tensor) -> int:
        """Take an array along; returns its first byte in the source."""
        size_bytes = array.numel() * array.element_size()
        start = array.data_ptr() - self._address
        inside = start >= 0 and start + size_bytes <= self._memory_bytes
        # Kernels read one number at a time, so its own size is boundary enough.
        if not inside or start % array.element_size() or not array.is_contiguous():
            start = align_piece(self.source_bytes)
            self.pieces.append((start, array))
            self.source_bytes = start + size_bytes
        self._low = start if self._low < 0 else min(self._low, start)
        self._high = max(self._high, start + size_bytes)
        self._n_bytes += size_bytes
        return start

    def reserve(self, size_bytes: int) -> int:
        """Room in the slab; returns its place in units."""
        place = self.slab_bytes // UNIT_BYTES
        self.slab_bytes += -(-size_bytes // UNIT_BYTES) * UNIT_BYTES
        return place

    def _add_job(self, *fields: int) -> None:
        self.jobs.append([*fields, *_FEW_PER_JOB[len(fields)]])

    def add_codes(self, factor: PackedFactor, place: int, order: WordOrder) -> None:
        """Jobs that put a factor's codes into rows of steps at `place`."""
        source = self.place(factor.codes)
        n_groups = words_of(factor.cols)
        whole_groups = factor.cols // TILE_CODES * (TILE_CODES // WORD_COLUMNS)
        for first, last, whole in ((0, whole_groups, 1), (whole_groups, n_groups, 0)):
            if first < last:
                self._add_job(
                    CODES_JOB,
                    source,
                    place * UNIT_BYTES,
                    order.steps,
                    factor.rows,
                    factor.cols,
                    factor.codes.shape[1],
                    factor.bits,
                    first,
                    last - first,
                    whole,
                    order.first,
                    order.tile,
                    order.group,
                    order.bit,
                )

    def add_groups(self, factor: PackedFactor) -> int:
        """Job of the scales and zero points of tiles; returns their place."""
        n_tiles = -(-factor.cols // TILE_CODES)
        row_blocks = FragmentShape(factor.rows, 0).row_blocks
        place = self.reserve(n_tiles * row_blocks * 16 * 4)
        self._add_job(
            GROUPS_JOB,
            self.place(factor.scale),
            place * UNIT_BYTES,
            -1 if factor.zero is None else self.place(factor.zero),
            factor.rows,
            factor.cols,
            factor.group[0] or factor.rows,
            factor.bits,
            factor.group[1] or factor.cols,
        )
        return place

    def add_factors(
        self,
        rows: int,
        sigma: torch.Tensor | None,
        scales: Sequence[tuple[torch.Tensor, int]],
    ) -> int:
        """Job of a row factor, sigma times the scales; returns its place."""
        place = self.reserve(rows * 4)
        fields = [-1, 1, -1, 1]
        for number, (scale, group) in enumerate(scales):
            fields[2 * number : 2 * number + 2] = [self.place(scale), group]
        first = -1 if sigma is None else self.place(sigma)
        self._add_job(FACTORS_JOB, first, place * UNIT_BYTES, 0, rows, *fields)
        return place


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
    record: int
    bound: float

    @property
    def words(self) -> int:
        """Words up to the last one of this band."""
        groups = words_of(self.band.rank)
        full, rest = divmod(groups - 1, STEP_WORDS)
        bits = self.band.u.bits
        return self.order.first + full * self.order.tile + rest * self.order.group + bits


def _is_folded(band: PackedBand) -> bool:
    return _is_by_column(band.u)


def _limit_hidden(band: PackedBand, sigma: torch.Tensor) -> float:
    """Upper limit of |h| times what the highest bit of U is worth, for an input of length 1."""
    lengths = _row_lengths(band.v) * sigma.numpy()
    if _is_folded(band):
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
        if _is_folded(band) or _is_by_row(band.u):
            tile, steps = STEP_WORDS * bits, 0
        else:
            tile_steps = -(-bits * min(groups, STEP_WORDS) // STEP_WORDS)
            tile, steps = STEP_WORDS * tile_steps, count_steps(band.rank) * tile_steps
        start = first if _is_folded(band) else 0
        order = WordOrder(first=start, tile=tile, group=bits, bit=1, steps=steps)
        one = _Band(band=band, sigma=sigma, order=order, record=0, bound=bound)
        if _is_folded(band):
            shared.append(one)
            first = one.words
        else:
            found.append([one])
    return ([shared] if shared else []) + found


def _settle(chosen: list[_Band], record: int) -> list[_Band]:
    """Bands of one record with the steps and the limit that they share."""
    steps = max(band.order.steps for band in chosen) or -(-chosen[-1].words // STEP_WORDS)
    bound = max(band.bound for band in chosen)
    return [
        replace(band, order=replace(band.order, steps=steps), record=record, bound=bound)
        for band in chosen
    ]


def _add_first(writer: JobWriter, name: str, one: _Band, target: Target) -> Record:
    """Record of V of one band."""
    v, u = one.band.v, one.band.u
    by_row = _is_by_row(v)
    scales = [(v.scale, v.group[0] or v.rows)] if by_row else []
    if _is_folded(one.band):
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
        steps=count_steps(factor.cols),
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
    if not _is_folded(bands[0].band):
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
        steps=order.steps,
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
        bands = _settle(chosen, record)
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
