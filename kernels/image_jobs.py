"""Jobs that put the factors of a delta in operand order."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from deltacome_core.errors import UserError
from deltacome_core.layout import TILE_CODES
from deltacome_core.packed import PackedFactor
from kernels.fragments import (
    STEP_ROWS,
    STEP_WORDS,
    UNIT_BYTES,
    WORD_COLUMNS,
    FragmentShape,
    WordOrder,
    words_of,
)

JOB_FIELDS: Final = 16
CODES_JOB: Final = 0
FACTORS_JOB: Final = 1
GROUPS_JOB: Final = 2
PIECE_ALIGNMENT_BYTES: Final = 16
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


def count_elements(jobs: npt.NDArray[np.int64]) -> int:
    """What programs of the largest job count through: words, factors or scales.

    Args:
        jobs: [n, JOB_FIELDS].

    Returns:
        How many, 0 where there are no jobs.
    """
    rows = -(-jobs[:, 4] // STEP_ROWS) * STEP_ROWS
    words = rows * -(-jobs[:, 9] // (2 * STEP_WORDS)) * (2 * STEP_WORDS)
    scales = rows * -(-jobs[:, 5] // TILE_CODES)
    kinds = (jobs[:, 0] == CODES_JOB, jobs[:, 0] == GROUPS_JOB)
    return int(np.select(kinds, (words, scales), default=rows).max(initial=0))


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
