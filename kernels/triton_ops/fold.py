"""Sums of the matrix instruction as fp32: planes joined, zero points taken off, scales applied."""

import triton
import triton.language as tl

from kernels.triton_ops.items import four_items, replace_items


@triton.constexpr_function
def spare_bits(bits):
    """Bits of a byte below twice its code: what `unpack_step` multiplies odd numbers by."""
    return 7 - bits if bits < 8 else 0  # noqa: PLR2004 bits of a byte


@triton.constexpr_function
def needs_ones(bits, has_zero):
    """Whether sums of x are needed: less wide codes lose a mid-range zero as they are unpacked."""
    return has_zero or bits == 8  # noqa: PLR2004 bits of a byte


@triton.jit
def double_sum(c, ones, twice_zero, BITS: tl.constexpr, HAS_ZERO: tl.constexpr):
    """Sum of (2 code - twice_zero) x from the sum of the bytes of `unpack_step` times x.

    Args:
        c: int32 [threads], the sum.
        ones: int32 [threads], the sum of x.
        twice_zero: Twice the zero point, int32 scalar or [threads]; unread without HAS_ZERO.
        BITS: 1, 2, 3, 4 or 8; 8 without HAS_ZERO.
        HAS_ZERO: Without it zero is mid-range, 2 twice_zero = 2^BITS - 1.

    Returns:
        int32 [threads].
    """
    if BITS == 8:  # noqa: PLR2004 same
        c = 2 * c
        if HAS_ZERO:
            c += (256 - twice_zero) * ones
        else:
            c += ones
    else:
        c = (c >> spare_bits(BITS)) + ((1 << BITS) - 1 - twice_zero) * ones
    return c


@triton.jit
def fold_planes(
    c, sums, twice_zero, weights, HALF: tl.constexpr, BITS: tl.constexpr, HAS_ZERO: tl.constexpr
):
    """Sums of two planes as one fp32, the zero point taken off while they are whole numbers.

    Args:
        c: Of `multiply_step`.
        sums: Two int32 [threads], the sums of the planes themselves; unread without `needs_ones`.
        twice_zero: Of `double_sum`.
        weights: Two fp32 [threads], what a unit of either plane is worth.
        HALF: 0 for row g, 1 for row g + 8.
        BITS: Of `double_sum`.
        HAS_ZERO: Same.

    Returns:
        fp32 [threads], twice the product of this lane's planes.
    """
    first, second = c[2 * HALF], c[2 * HALF + 1]
    worth: tl.constexpr = 1.0 if needs_ones(BITS, HAS_ZERO) else 2.0 ** -spare_bits(BITS)
    if needs_ones(BITS, HAS_ZERO):
        first = double_sum(first, sums[0], twice_zero, BITS, HAS_ZERO)
        second = double_sum(second, sums[1], twice_zero, BITS, HAS_ZERO)
    # A power of two scales a weight once, not every sum, and rounds nothing.
    high = first.to(tl.float32) * (worth * weights[0])
    return high + second.to(tl.float32) * (worth * weights[1])


@triton.jit
def fold_tiles(
    totals,
    acc,
    sums,
    groups_at,
    exists,
    first_block,
    n_blocks,
    weights,
    lane,
    BITS: tl.constexpr,
    R: tl.constexpr,
    NT: tl.constexpr,
):
    """`totals` of `multiply_band` plus the sums of a pair of steps, each times its tile's scale.

    Args:
        totals: NT x R x 2 fp32 [threads].
        acc: Of `multiply_unit`.
        sums: Same.
        groups_at: int32 pointers [threads], scale and zero point of the tile's first row.
        exists: bool [threads], whether the pair does.
        first_block: Of `multiply_band`, and so all that are not named here.
        n_blocks: Same.
        weights: Same.
        lane: Same.
        BITS: Same.
        R: Same.
        NT: Same.

    Returns:
        The totals.
    """
    for unit in tl.static_range(NT):
        ones = (sums[2 * unit], sums[2 * unit + 1])
        for r in tl.static_range(R):
            c = four_items(acc, unit * R + r)
            mask = exists & (first_block + r < n_blocks)
            for half in tl.static_range(2):
                row = (first_block + r) * 16 + lane // 4 + 8 * half
                word = tl.load(groups_at + row, mask=mask, other=0)
                scale = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                twice_zero = (word >> 16) & 511
                term = scale * fold_planes(c, ones, twice_zero, weights, half, BITS, True)
                term += totals[2 * (unit * R + r) + half]
                totals = replace_items(totals, (term,), 2 * (unit * R + r) + half, 1)
    return totals
