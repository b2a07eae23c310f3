"""Where the codes of a resident matrix lie: the operand order of the binary matrix instruction.

A code of b bits is b columns of one bit. The unit is a step: 16 rows by 128 such columns, half of
an `mma.m16n8k256` of single bits. Lane `4 g + t` of a warp holds of it two words, columns
`32 t .. 32 t + 31` of row g and of row g + 8, the first column in the lowest bit. A pair of steps
is 512 bytes: a lane's words of both lie side by side, 16 bytes that it loads at once and multiplies
as they are. PTX ISA 8.7, "Matrix Fragments for mma.m16n8k256".

The k-th highest bits of 32 codes that follow each other are a word. Words of V lie by bit, then by
column; those of U one code's bits side by side, bands after each other, so that few ranks fill
steps (`WordOrder`).
"""

from dataclasses import dataclass
from typing import Final

STEP_ROWS: Final = 16
STEP_COLUMNS: Final = 128
WORD_COLUMNS: Final = 32
STEP_WORDS: Final = STEP_COLUMNS // WORD_COLUMNS
STEP_BYTES: Final = STEP_ROWS * STEP_COLUMNS // 8
# One instruction takes two steps.
PAIR_COLUMNS: Final = 2 * STEP_COLUMNS
# Pairs of a row of blocks that a warp loads at once, at most, whether they exist or not.
MOST_AHEAD: Final = 8
# Sections of a slab begin where a warp's load of one word a lane is one memory transaction.
UNIT_BYTES: Final = 128
# Bits of activations and hidden values that one instruction takes: a unit is one byte of a token.
UNIT_COLUMNS: Final = 8
# Bytes of the whole numbers that activations and hidden values become.
PLANES: Final = 4
FAST_PLANES: Final = 3
PRECISIONS: Final[dict[str, int]] = {"exact": PLANES, "fast": FAST_PLANES}
# Bits above the highest that repeat the sign: a number shifted by less than eight bits is the same
# bits, read from further on.
SIGN_BITS: Final = 8


def count_steps(columns: int) -> int:
    """Steps of so many columns of one bit."""
    return -(-columns // STEP_COLUMNS)


def count_pairs(steps: int) -> int:
    """Instructions that so many steps take."""
    return -(-steps // 2)


def fill_pairs(steps: int) -> int:
    """Steps that so many take with those that fill the last pair."""
    return 2 * count_pairs(steps)


def words_of_pair(planes: int) -> int:
    """Words of a pair of steps of a source: all bits of its numbers and the sign again."""
    return (UNIT_COLUMNS * planes + SIGN_BITS) * 2 * STEP_WORDS


# Words of zeros before the bits of a plan's first token: of a pair that does not exist.
ZERO_WORDS: Final = words_of_pair(PLANES)


def words_of(columns: int) -> int:
    """Words that the same bit of so many codes fills."""
    return -(-columns // WORD_COLUMNS)


@dataclass(frozen=True, slots=True, kw_only=True)
class WordOrder:
    """Which word of a row of steps holds bit k, from the highest, of the q-th 32 codes of a row.

    It is first + q // 4 * tile + q % 4 * group + k * bit, of `steps` steps of four words, whole
    pairs of them.
    """

    first: int
    tile: int
    group: int
    bit: int
    steps: int


def order_by_bit(*, columns: int, bits: int) -> WordOrder:
    """One bit of all codes after the other: what a source of plain columns is read by."""
    steps = fill_pairs(count_steps(columns))
    return WordOrder(first=0, tile=4, group=1, bit=4 * steps, steps=bits * steps)


def order_by_tile(*, columns: int, bits: int) -> WordOrder:
    """All bits of 128 codes, one after the other, then those of the next: a tile has a scale."""
    steps = fill_pairs(bits * count_steps(columns))
    return WordOrder(first=0, tile=4 * bits, group=1, bit=4, steps=steps)


@dataclass(frozen=True, slots=True)
class FragmentShape:
    """Sizes of one factor [rows, steps of 128 columns of one bit] in operand order."""

    rows: int
    steps: int

    @property
    def row_blocks(self) -> int:
        return -(-self.rows // STEP_ROWS)

    @property
    def size_bytes(self) -> int:
        return self.row_blocks * self.steps * STEP_BYTES
