"""The directory of an arena: what a kernel must know of one tenant's delta at one site.

One entry is int32 [ENTRY_INTS] for each slot and site:

| ints | what |
|---|---|
| 32 | rows of each shrink record, rounded up to whole words |
| 32 | output rows of each part |
| 32 x 20 | shrink records, one a band of each part |
| 8 x 8 | parts: first output row, source, number of records |
| 8 x 5 x 20 | expand records of each part: one for bands with a scale a vector, and others |

A record is: how often its source is read, each time one bit further on, codes, rows, row blocks,
steps of a reading, row factors, group words, bound (fp32 bits), first pair in its source, steps of
a tile, bits of its codes; of the first stage then where hidden values go: first word, words of a
tile, bits they are read with, words after the last that are 0, first row and column of `unfold`,
part, record. Places count units of 128 bytes from the slab's start; 0 means absent, since a slab
begins with an empty unit.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kernels.fragments import count_pairs

MAX_RECORDS: Final = 32
MAX_PARTS: Final = 8
MAX_OUTPUTS: Final = 5
RECORD_INTS: Final = 20
PART_INTS: Final = 8
SHRINK_SIZES: Final = 0
EXPAND_SIZES: Final = MAX_RECORDS
SHRINK_RECORDS: Final = 2 * MAX_RECORDS
EXPAND_PARTS: Final = SHRINK_RECORDS + MAX_RECORDS * RECORD_INTS
EXPAND_RECORDS: Final = EXPAND_PARTS + MAX_PARTS * PART_INTS
ENTRY_INTS: Final = EXPAND_RECORDS + MAX_PARTS * MAX_OUTPUTS * RECORD_INTS

SOURCE_HIDDEN: Final = 0
SOURCE_INPUT: Final = 1


def _bits_of(value: float) -> int:
    return int(np.float32(value).view(np.int32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where the hidden values of a band go, and the columns of U that they meet.

    first, tile: of the `WordOrder` of U; bits: of U's codes, as many words as each 32 ranks take.
    zeros: words after the last one that no column of U meets. row, column: of the factors that
    `unfold` writes. part, record: whose columns.
    """

    first: int
    tile: int
    bits: int
    zeros: int
    row: int
    column: int
    part: int
    record: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Codes of one product in a slab; places count units of 128 bytes, 0 is absent.

    readings: how often the source is read; steps: of one reading. first_pair: in its source.
    tile_steps: steps that share scales. bits: of the codes, of the first band's where there are
    several. bound: limits |h| for an input of length 1; 1 where the source is the input.
    """

    readings: int
    codes: int
    rows: int
    row_blocks: int
    steps: int
    factors: int
    groups: int
    bound: float
    first_pair: int
    tile_steps: int
    bits: int
    target: Target | None = None

    @property
    def pairs(self) -> int:
        """Instructions of one reading."""
        return count_pairs(self.steps)

    def fields(self) -> list[int]:
        """The record as a kernel reads it."""
        target = self.target
        return [
            self.readings,
            self.codes,
            self.rows,
            self.row_blocks,
            self.steps,
            self.factors,
            self.groups,
            _bits_of(self.bound),
            self.first_pair,
            self.tile_steps,
            self.bits,
            *(
                ()
                if target is None
                else (
                    target.first,
                    target.tile,
                    target.bits,
                    target.zeros,
                    target.row,
                    target.column,
                    target.part,
                    target.record,
                )
            ),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One matrix of a site in a slab."""

    first_row: int
    rows: int
    source: int
    expand: tuple[Record, ...]


def encode_site(shrink: list[Record], parts: list[Part | None]) -> npt.NDArray[np.int32]:
    """Write the directory entry of one tenant at one site.

    Args:
        shrink: records of the first stage.
        parts: the site's matrices in order; None where the delta leaves one unchanged.

    Returns:
        int32 [ENTRY_INTS].
    """
    entry = np.zeros(ENTRY_INTS, dtype=np.int32)
    for number, record in enumerate(shrink):
        entry[SHRINK_SIZES + number] = -(-record.rows // 32) * 32
        at, fields = SHRINK_RECORDS + number * RECORD_INTS, record.fields()
        entry[at : at + len(fields)] = fields
    for number, part in enumerate(parts):
        if part is None:
            continue
        entry[EXPAND_SIZES + number] = part.rows
        at = EXPAND_PARTS + number * PART_INTS
        entry[at : at + 3] = [part.first_row, part.source, len(part.expand)]
        for place, record in enumerate(part.expand, number * MAX_OUTPUTS):
            at, fields = EXPAND_RECORDS + place * RECORD_INTS, record.fields()
            entry[at : at + len(fields)] = fields
    return entry
