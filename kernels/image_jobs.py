"""Jobs that put the factors of a delta in operand order, and records that say where they lie."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from deltacome_core.errors import UserError
from deltacome_core.layout import TILE_CODES
from deltacome_core.packed import PackedBand, PackedFactor, PackedLinear, PackedMatrix
from kernels.directory import SOURCE_HIDDEN, SOURCE_INPUT, Part, Record
from kernels.fragments import STEP_COLUMNS, UNIT_BYTES, FragmentShape

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

    def add_codes(self, factor: PackedFactor, shape: FragmentShape) -> tuple[int, int]:
        """Jobs of a factor's codes; returns the places of the codes and of the third bit."""
        source = self.place(factor.codes)
        low = self.reserve(shape.low_bytes)
        high = self.reserve(shape.high_bytes) if shape.high_bytes else 0
        n_pairs = -(-shape.steps // 2)
        whole_pairs = factor.cols // TILE_CODES * (TILE_CODES // STEP_COLUMNS // 2)
        for first, last, whole in ((0, whole_pairs, 1), (whole_pairs, n_pairs, 0)):
            if first < last:
                self._add_job(
                    CODES_JOB,
                    source,
                    low * UNIT_BYTES,
                    high * UNIT_BYTES,
                    factor.rows,
                    factor.cols,
                    factor.codes.shape[1],
                    factor.bits,
                    first,
                    last - first,
                    whole,
                )
        return low, high

    def add_groups(self, factor: PackedFactor, shape: FragmentShape) -> int:
        """Job of the scales and zero points of tiles; returns their place."""
        n_tiles = -(-factor.cols // TILE_CODES)
        place = self.reserve(n_tiles * shape.row_blocks * 16 * 4)
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


def _add_band(
    writer: JobWriter, name: str, band: PackedBand, sigma: torch.Tensor, *, step: int
) -> tuple[Record, Record]:
    """Records of V and U of one band."""
    v, u = band.v, band.u
    folded = _is_by_column(u)
    by_row = _is_by_row(v)
    shape = FragmentShape(v.rows, v.cols, v.bits)
    codes, high = writer.add_codes(v, shape)
    scales = [(v.scale, v.group[0] or v.rows)] if by_row else []
    lengths = _row_lengths(v) * sigma.numpy()
    if folded:
        scales.append((u.scale, 1 if u.scale.numel() > 1 else u.cols))
        lengths = lengths * u.scale.numpy().reshape(-1).astype(np.float64)
    groups = 0
    if not by_row:
        _check_tiles(name, v)
        groups = writer.add_groups(v, shape)
    bound = max(_LEAST_BOUND, float(lengths.max()) * _BOUND_MARGIN)
    first = Record(
        bits=v.bits,
        codes=codes,
        high=high,
        rows=v.rows,
        row_blocks=shape.row_blocks,
        steps=shape.steps,
        factors=writer.add_factors(v.rows, sigma, scales),
        groups=groups,
        first_step=step,
        bound=bound,
    )
    last = _add_output(writer, name, u, scaled=not folded, step=step, bound=bound)
    return first, last


def _add_output(
    writer: JobWriter, name: str, factor: PackedFactor, *, scaled: bool, step: int, bound: float
) -> Record:
    """Record of a factor whose rows are outputs; without `scaled` its scales lie elsewhere."""
    shape = FragmentShape(factor.rows, factor.cols, factor.bits)
    codes, high = writer.add_codes(factor, shape)
    factors = groups = 0
    if scaled and _is_by_row(factor):
        group = factor.group[0] or factor.rows
        factors = writer.add_factors(factor.rows, None, [(factor.scale, group)])
    elif scaled:
        _check_tiles(name, factor)
        groups = writer.add_groups(factor, shape)
    return Record(
        bits=factor.bits,
        codes=codes,
        high=high,
        rows=factor.rows,
        row_blocks=shape.row_blocks,
        steps=shape.steps,
        factors=factors,
        groups=groups,
        first_step=step,
        bound=bound,
    )


def add_matrix(
    writer: JobWriter, matrix: PackedLinear, *, first_row: int, step: int
) -> tuple[Part, list[Record]]:
    """Jobs of one matrix of a site.

    Args:
        writer: of the delta.
        matrix: on the CPU.
        first_row: its first output among those of the site.
        step: its first step of hidden values.

    Returns:
        The part, and its records of the first stage.

    Raises:
        UserError: arena_recipe_unknown.
    """
    shrink: list[Record] = []
    expand: list[Record] = []
    source, first_step = SOURCE_HIDDEN, step
    if isinstance(matrix, PackedMatrix):
        first = 0
        for band in matrix.bands:
            sigma = matrix.sigma[first : first + band.rank]
            v, u = _add_band(writer, matrix.name, band, sigma, step=step)
            shrink.append(v)
            expand.append(u)
            step += u.steps
            first += band.rank
    else:
        source = SOURCE_INPUT
        factor = matrix.factor
        expand.append(_add_output(writer, matrix.name, factor, scaled=True, step=0, bound=1.0))
    if len({record.bits for record in expand}) < len(expand):
        raise refuse(matrix.name, "two rank bands of one width")
    part = Part(
        first_row=first_row,
        rows=matrix.out_features,
        source=source,
        first_step=first_step,
        expand=tuple(expand),
    )
    return part, shrink
