"""Where the codes of a resident matrix lie: the operand order of the int8 matrix instruction.

The unit is a step: 16 rows by 32 columns, one `mma.m16n8k32`. Lane `4 g + t` of a warp holds of it,
for i = 0..3 and b = 0..3, the code of row `g + 8 (i % 2)` and column `8 t + 4 (i // 2) + b`: four
registers of four bytes each. A step of a b-bit matrix is 64 b bytes, so nothing is wasted but the
padding of rows to 16 and of columns to 32. PTX ISA 8.7, "Matrix Fragments for mma.m16n8k32".
"""

from dataclasses import dataclass
from typing import Final

STEP_ROWS: Final = 16
STEP_COLUMNS: Final = 32
# Sections of a slab begin where a warp's load of one word a lane is one memory transaction.
UNIT_BYTES: Final = 128
# Columns of one instruction: two tokens of four int8 planes, or four of two, are a unit.
UNIT_COLUMNS: Final = 8
PLANES: Final = 4
FAST_PLANES: Final = 2
PRECISIONS: Final[dict[str, int]] = {"exact": PLANES, "fast": FAST_PLANES}
# Words of a lane for two steps of the low plane. One bit needs both steps for one word.
PAIR_WORDS: Final[dict[int, int]] = {1: 1, 2: 2, 3: 2, 4: 4, 8: 8}


def count_unit_tokens(planes: int) -> int:
    """Tokens that fill the columns of one instruction.

    Args:
        planes: int8 planes of a token, PLANES (exact) or FAST_PLANES.
    """
    return UNIT_COLUMNS // planes


@dataclass(frozen=True, slots=True)
class FragmentShape:
    """Sizes of one factor of codes [rows, columns] in operand order."""

    rows: int
    columns: int
    bits: int

    @property
    def row_blocks(self) -> int:
        return -(-self.rows // STEP_ROWS)

    @property
    def steps(self) -> int:
        """Steps along a row of blocks."""
        return -(-self.columns // STEP_COLUMNS)

    @property
    def low_bytes(self) -> int:
        """Bytes of the plane that every width has; of three bits it is the lower two."""
        if self.bits == 1:
            return self.row_blocks * -(-self.steps // 2) * UNIT_BYTES
        return self.row_blocks * self.steps * PAIR_WORDS[self.bits] // 2 * UNIT_BYTES

    @property
    def high_bytes(self) -> int:
        """Bytes of the third bit's plane."""
        return self.row_blocks * -(-self.steps // 2) * UNIT_BYTES if self.bits == 3 else 0  # noqa: PLR2004

    @property
    def size_bytes(self) -> int:
        return self.low_bytes + self.high_bytes
