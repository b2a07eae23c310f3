"""Single bits on the tensor cores, one register a lane.

A tensor of as many elements as the program has threads puts element i into thread i, so that a 1-D
tensor is one register of every lane and Triton can issue an instruction whose operands it cannot
describe (docs/adr/0014). Exchanges between lanes are not called pure: a compiler might move them to
where not all lanes are. The plain forms are what the interpreter runs; all else is shared.
"""

import triton
import triton.language as tl

TRANSPOSE = tl.constexpr(
    "{ .reg .pred p; .reg .b32 w, y, keep, turn; mov.b32 w, $1;"
    + "".join(
        f" and.b32 y, $2, {size}; setp.ne.u32 p, y, 0;"
        f" selp.b32 keep, {~mask & 0xFFFFFFFF:#x}, {mask:#x}, p;"
        f" selp.b32 turn, {32 - size}, {size}, p;"
        f" shfl.sync.bfly.b32 y, w, {size}, 31, 0xffffffff;"
        " shf.l.wrap.b32 y, y, y, turn;"
        " lop3.b32 w, w, y, keep, 0xe4;"
        for size, mask in (
            (16, 0x0000FFFF),
            (8, 0x00FF00FF),
            (4, 0x0F0F0F0F),
            (2, 0x33333333),
            (1, 0x55555555),
        )
    )
    + " mov.b32 $0, w; }"
)


@triton.jit
def load_four(at, USE_PTX: tl.constexpr):
    """Four words that lie side by side, an operand of `multiply_pair`.

    Args:
        at: int64 pointers [threads], multiples of 16 bytes.
        USE_PTX: One load, whose registers are the instruction's as they lie. Under a condition they
            would not be: where several loads meet, each word is copied once more.

    Returns:
        Four int32 [threads]; of plain Triton two int64.
    """
    if USE_PTX:
        words = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [at],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        found = (words[0], words[1], words[2], words[3])
    else:
        found = (tl.load(at), tl.load(at + 1))
    return found


@triton.jit
def split_word(word, USE_PTX: tl.constexpr):
    """An int64 [threads] as `load_four` has it, with zeros for the second step."""
    if USE_PTX:
        none = tl.zeros(word.shape, dtype=tl.int32)
        found = (word.to(tl.int32), (word >> 32).to(tl.int32), none, none)
    else:
        found = (word, tl.zeros_like(word))
    return found


@triton.jit
def transpose_bits(values, lane, USE_PTX: tl.constexpr):
    """Bit i of what lane p gets is bit p of the value of lane i.

    Args:
        values: int32 [threads].
        lane: int32 [threads], 0..31.
        USE_PTX: Five exchanges between lanes; without it the same bits in plain Triton.

    Returns:
        int32 [threads].
    """
    if USE_PTX:
        words = tl.inline_asm_elementwise(
            TRANSPOSE, "=r,r,r", [values, lane], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        warps: tl.constexpr = values.shape[0] // 32
        bit = tl.arange(0, 32)
        ones = ((tl.reshape(values, (warps, 32, 1)) >> bit[None, None, :]) & 1).to(tl.int64)
        # Sums are what the interpreter does at once; in 64 bits none is too large.
        words = tl.sum(ones << bit[None, :, None], axis=1).to(tl.int32)
        words = tl.reshape(words, (warps * 32,))
    return words


@triton.jit
def vote_negative(values, USE_PTX: tl.constexpr):
    """Which of a warp's values are below 0: bit i is that of lane i, the same for all its lanes."""
    if USE_PTX:
        words = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.lt.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }",
            "=r,r",
            [values],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        warps: tl.constexpr = values.shape[0] // 32
        bit = tl.arange(0, 32)
        negative = ((tl.reshape(values, (warps, 32)) >> 31) & 1).to(tl.int64) << bit[None, :]
        words = tl.sum(negative, axis=1).to(tl.int32)[:, None]
        words += tl.zeros((warps, 32), dtype=tl.int32)
        words = tl.reshape(words, (warps * 32,))
    return words


@triton.jit
def read_fourth(values, lane, USE_PTX: tl.constexpr):
    """The value of the last of each four lanes.

    Args:
        values: int32 [threads].
        lane: int32 [threads], 0..31.
        USE_PTX: One exchange between lanes; without it the same in plain Triton.

    Returns:
        int32 [threads].
    """
    if USE_PTX:
        last = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;",
            "=r,r,r",
            [values, lane | 3],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        fours: tl.constexpr = values.shape[0] // 4
        own = tl.where(lane % 4 == 3, values, 0)  # noqa: PLR2004 the last of four
        last = tl.sum(tl.reshape(own, (fours, 4)), axis=1)[:, None]
        last = tl.reshape(last + tl.zeros((fours, 4), dtype=tl.int32), (values.shape[0],))
    return last


@triton.jit
def exchange(values, APART: tl.constexpr, USE_PTX: tl.constexpr):
    """The value of the lane whose number differs in the bit APART.

    Args:
        values: int32 or fp32 [threads].
        APART: 1 or 2.
        USE_PTX: One exchange between lanes; without it the same in plain Triton.

    Returns:
        As many of the same type.
    """
    if USE_PTX:
        other = tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;",
            "=r,r,r",
            [values.to(tl.int32, bitcast=True), APART],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        other = other.to(values.dtype, bitcast=True)
    else:
        pairs = tl.reshape(values, (values.shape[0] // (2 * APART), 2, APART))
        is_first = (tl.arange(0, 2) == 0)[None, :, None]
        first = tl.sum(tl.where(is_first, pairs, 0), axis=1)[:, None, :]
        second = tl.sum(tl.where(is_first, 0, pairs), axis=1)[:, None, :]
        other = tl.reshape(tl.where(is_first, second, first), values.shape)
    return other


@triton.jit
def add_half(first, second, lane, APART: tl.constexpr, USE_PTX: tl.constexpr):
    """Sums over two lanes: of `first` in the one whose bit APART is 0, of `second` in the other."""
    is_first = lane & APART == 0
    kept = tl.where(is_first, first, second)
    return kept + exchange(tl.where(is_first, second, first), APART, USE_PTX)


@triton.jit
def deal_rows(shares, lane, R: tl.constexpr, USE_PTX: tl.constexpr):
    """Sums over four lanes, dealt to them: `row_of_share` says which row a lane gets.

    Args:
        shares: 2 R int32 or fp32 [threads]: rows g and g + 8 of each block.
        lane: int32 [threads], 0..31.
        R: Row blocks, 1 or 2.
        USE_PTX: Of `exchange`.

    Returns:
        [threads] of the same type; with R = 1 two lanes have the same.
    """
    tl.static_assert(R <= 2)  # noqa: PLR2004 a lane has no more than one row
    dealt = add_half(shares[0], shares[R], lane, 2, USE_PTX)
    if R == 1:
        dealt += exchange(dealt, 1, USE_PTX)
    else:
        dealt = add_half(dealt, add_half(shares[1], shares[3], lane, 2, USE_PTX), lane, 1, USE_PTX)
    return dealt


@triton.jit
def count_nibbles(words):
    """Bits that are set in each four of int64 words."""
    pairs = words - ((words >> 1) & 0x5555555555555555)
    return (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)


@triton.jit
def multiply_plainly(first, second, planes):
    """The sums of `multiply_pair` without its instruction, of four bytes at once.

    Args:
        first: int64 [threads], rows g and g + 8 of the first step.
        second: int64 [threads], of the second.
        planes: Four int64 [threads], b0 and b1 of each byte.

    Returns:
        Four times the four sums of `multiply_pair`.
    """
    warps: tl.constexpr = first.shape[0] // 32
    source = tl.join(tl.join(planes[0], planes[2]), tl.join(planes[1], planes[3]))
    source = tl.reshape(source, (warps, 1, 8, 4, 2, 2))
    low = source & 0xFFFFFFFF
    high = (source >> 32) & 0xFFFFFFFF
    # [warps, rows, columns of x, lanes of four, bytes]
    first = tl.reshape(first, (warps, 8, 1, 4, 1, 1)) & (low | (low << 32))
    second = tl.reshape(second, (warps, 8, 1, 4, 1, 1)) & (high | (high << 32))
    nibbles = count_nibbles(first) + count_nibbles(second)
    ones = (nibbles & 0x0F0F0F0F0F0F0F0F) + ((nibbles >> 4) & 0x0F0F0F0F0F0F0F0F)
    ones = tl.sum(ones, axis=3)
    ones = (ones & 0x00FF00FF00FF00FF) + ((ones >> 8) & 0x00FF00FF00FF00FF)
    ones = (ones & 0xFFFF0000FFFF) + ((ones >> 16) & 0xFFFF0000FFFF)
    # [lanes, columns of x, bytes]
    ones = tl.reshape(ones, (warps * 32, 2, 2, 2))
    sums = ()
    for shift in tl.static_range(0, 64, 32):
        even_bytes, odd_bytes = tl.split((ones >> shift).to(tl.int32))
        sums += tl.split(even_bytes) + tl.split(odd_bytes)
    found = ()
    for byte in tl.static_range(4):
        number = byte % 2 * 2 + byte // 2
        found += tl.split(sums[number]) + tl.split(sums[4 + number])
    return found


@triton.jit
def multiply_pair(a, b0, b1, c):
    """Add how many bits two steps [16, 256] and eight rows of bits [256, 8] have in common.

    Args:
        a: Four int32 [threads]: rows g and g + 8 of the first step, then of the second.
        b0: int32 [threads], row `lane // 4` at columns 32 t .. 32 t + 31 of the first step.
        b1: int32 [threads], of the second.
        c: Four int32 [threads]: rows g, g, g + 8, g + 8 and rows of bits 2 t, 2 t + 1 in turn.

    Returns:
        The four sums.
    """
    d = tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
        [a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    return (d[0], d[1], d[2], d[3])
