"""The directory of an arena: what a kernel must know of one tenant's delta at one site.

One entry is int32 [ENTRY_INTS] for each slot and site:

| ints | what |
|---|---|
| 32 | rows of each shrink record, rounded up to whole steps |
| 32 | output rows of each part |
| 32 x 16 | shrink records, one a band of each part |
| 8 x 8 | parts: first output row, source, first step of hidden values |
| 8 x 5 x 16 | expand records of each part, one for each of WIDTHS, empty where absent |

A record is: bits, codes, plane of the third bit, rows, row blocks, steps, row factors, group words,
first step in its source (expand) or its target (shrink), bound (fp32 bits), marker of its codes.
Places count units of 128 bytes from the slab's start; 0 means absent, since a slab begins with an
empty unit.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

MAX_RECORDS: Final = 32
MAX_PARTS: Final = 8
RECORD_INTS: Final = 16
PART_INTS: Final = 8
SHRINK_SIZES: Final = 0
EXPAND_SIZES: Final = MAX_RECORDS
SHRINK_RECORDS: Final = 2 * MAX_RECORDS
EXPAND_PARTS: Final = SHRINK_RECORDS + MAX_RECORDS * RECORD_INTS
EXPAND_RECORDS: Final = EXPAND_PARTS + MAX_PARTS * PART_INTS
WIDTHS: Final = (8, 4, 3, 2, 1)
ENTRY_INTS: Final = EXPAND_RECORDS + MAX_PARTS * len(WIDTHS) * RECORD_INTS

SOURCE_HIDDEN: Final = 0
SOURCE_INPUT: Final = 1


def mark_codes(bits: int) -> int:
    """The one that kernels put below each code of less than 8 bits, in four bytes.

    A kernel reads it from the record because a compiler must not know it: a mask and a number in a
    register are one instruction (LOP3, which takes one constant), two constants are two.
    """
    return 0x01010101 << max(0, 7 - bits)


def _bits_of(value: float) -> int:
    return int(np.float32(value).view(np.int32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One band of one part in a slab; places count units of 128 bytes, 0 is absent.

    bound: limits |h| of the band for an input of length 1; 1 where the source is the input.
    """

    bits: int
    codes: int
    high: int
    rows: int
    row_blocks: int
    steps: int
    factors: int
    groups: int
    first_step: int
    bound: float

    def fields(self) -> list[int]:
        """The record as a kernel reads it."""
        return [
            self.bits,
            self.codes,
            self.high,
            self.rows,
            self.row_blocks,
            self.steps,
            self.factors,
            self.groups,
            self.first_step,
            _bits_of(self.bound),
            mark_codes(self.bits),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One matrix of a site in a slab."""

    first_row: int
    rows: int
    source: int
    first_step: int
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
        entry[at : at + 3] = [part.first_row, part.source, part.first_step]
        for record in part.expand:
            place = number * len(WIDTHS) + WIDTHS.index(record.bits)
            at, fields = EXPAND_RECORDS + place * RECORD_INTS, record.fields()
            entry[at : at + len(fields)] = fields
    return entry
