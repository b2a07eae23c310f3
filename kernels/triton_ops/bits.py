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
def count_bits(words):
    """Bits that are set in each word."""
    ones = words.to(tl.uint32, bitcast=True)
    ones = ones - ((ones >> 1) & 0x55555555)
    ones = (ones & 0x33333333) + ((ones >> 2) & 0x33333333)
    ones = (ones + (ones >> 4)) & 0x0F0F0F0F
    return ((ones * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def multiply_plainly(a, b0, b1, c):
    """The sums of `multiply_pair` without its instruction; arguments are the same."""
    warps: tl.constexpr = b0.shape[0] // 32
    x0 = tl.reshape(b0, (warps, 1, 8, 4))
    x1 = tl.reshape(b1, (warps, 1, 8, 4))
    rows = ()
    for half in tl.static_range(2):
        first = tl.reshape(a[half], (warps, 8, 1, 4)) & x0
        rows += (tl.join(first, tl.reshape(a[half + 2], (warps, 8, 1, 4)) & x1),)
    # [warps, rows, columns of x, lanes of four, steps, halves]
    ones = count_bits(tl.join(rows[0], rows[1]))
    sums = tl.reshape(tl.sum(tl.sum(ones, axis=4), axis=3), (warps, 8, 4, 2, 2))
    top, low = tl.split(sums)
    top_even, top_odd = tl.split(top)
    low_even, low_odd = tl.split(low)
    return (
        c[0] + tl.reshape(top_even, (warps * 32,)),
        c[1] + tl.reshape(top_odd, (warps * 32,)),
        c[2] + tl.reshape(low_even, (warps * 32,)),
        c[3] + tl.reshape(low_odd, (warps * 32,)),
    )


@triton.jit
def multiply_pair(a, b0, b1, c, USE_PTX: tl.constexpr):
    """Add how many bits two steps [16, 256] and eight rows of bits [256, 8] have in common.

    Args:
        a: Four int32 [threads]: rows g and g + 8 of the first step, then of the second.
        b0: int32 [threads], row `lane // 4` at columns 32 t .. 32 t + 31 of the first step.
        b1: int32 [threads], of the second.
        c: Four int32 [threads]: rows g, g, g + 8, g + 8 and rows of bits 2 t, 2 t + 1 in turn.
        USE_PTX: The instruction; without it the same sums in plain Triton.

    Returns:
        The four sums.
    """
    if USE_PTX:
        d = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
            [a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        d = multiply_plainly(a, b0, b1, c)
    return (d[0], d[1], d[2], d[3])
