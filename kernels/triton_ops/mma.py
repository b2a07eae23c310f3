"""Products of packed codes and int8 activations on the tensor cores, one register a lane.

A tensor of as many elements as the program has threads puts element i into thread i, so that a 1-D
tensor is one register of every lane and Triton can issue an instruction whose operands it cannot
describe. Unpacked codes never leave their registers: that is what made tl.dot lose to dp4a here
(docs/adr/0008). The plain form of `multiply_step` is what the interpreter runs; all else is shared.
"""

import triton
import triton.language as tl

from kernels.triton_ops.codes import (
    load_ahead,
    load_blocks,
    move_blocks,
    replace_blocks,
    unpack_step,
)


@triton.jit
def replace_items(items, new, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """`items` with COUNT of them, from FIRST on, replaced by `new`."""
    return items[:FIRST] + new + items[FIRST + COUNT :]


@triton.jit
def add_to_items(items, term):
    """`items`, each with `term` added."""
    sums = ()
    for i in tl.static_range(len(items)):
        sums += (items[i] + term,)
    return sums


@triton.jit
def four_items(items, NUMBER: tl.constexpr):
    """The NUMBER-th four of `items`."""
    return (
        items[4 * NUMBER],
        items[4 * NUMBER + 1],
        items[4 * NUMBER + 2],
        items[4 * NUMBER + 3],
    )


@triton.jit
def multiply_plainly(a, b0, b1, c):
    """The sums of `multiply_step` without its instruction; arguments are the same."""
    warps: tl.constexpr = b0.shape[0] // 32
    shift = 8 * tl.arange(0, 4)
    x0 = (tl.reshape(b0, (warps, 1, 8, 4, 1)) << (24 - shift)) >> 24
    x1 = (tl.reshape(b1, (warps, 1, 8, 4, 1)) << (24 - shift)) >> 24
    sums = ()
    for half in tl.static_range(2):
        first = (tl.reshape(a[half], (warps, 8, 1, 4, 1)) << (24 - shift)) >> 24
        second = (tl.reshape(a[half + 2], (warps, 8, 1, 4, 1)) << (24 - shift)) >> 24
        terms = tl.reshape(first * x0 + second * x1, (warps, 8, 8, 16))
        sums += (tl.sum(terms, axis=3),)
    top, low = sums
    top_even, top_odd = tl.split(tl.reshape(top, (warps, 8, 4, 2)))
    low_even, low_odd = tl.split(tl.reshape(low, (warps, 8, 4, 2)))
    return (
        c[0] + tl.reshape(top_even, (warps * 32,)),
        c[1] + tl.reshape(top_odd, (warps * 32,)),
        c[2] + tl.reshape(low_even, (warps * 32,)),
        c[3] + tl.reshape(low_odd, (warps * 32,)),
    )


@triton.jit
def multiply_step(a, b0, b1, c, USE_PTX: tl.constexpr):
    """Add one step, codes s8 [16, 32] by activations s8 [32, 8], to sums s32 [16, 8] of each warp.

    Args:
        a: Four int32 [threads] of four codes each, in operand order.
        b0: int32 [threads], columns 8 t .. 8 t + 3 of activation `lane // 4`.
        b1: int32 [threads], columns 8 t + 4 .. 8 t + 7.
        c: Four int32 [threads]: rows g, g, g + 8, g + 8 and activations 2 t, 2 t + 1 in turn.
        USE_PTX: The instruction; without it the same sums in plain Triton.

    Returns:
        The four sums.
    """
    if USE_PTX:
        d = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
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
def multiply_unit(
    acc,
    sums,
    words,
    marker,
    b,
    STEP: tl.constexpr,
    UNIT: tl.constexpr,
    BITS: tl.constexpr,
    R: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """One step of R row blocks and one unit of activations, added to its sums.

    Args:
        acc: int32 [threads], four for each unit and row block.
        sums: int32 [threads], two for each unit: of the activations themselves.
        words: R tuples of `load_pair`.
        marker: Of `unpack_step`.
        b: int64 [threads], the unit's planes of this step, 0 where none exist.
        STEP: 0 or 1.
        UNIT: Number of the unit.
        BITS: 1, 2, 3, 4 or 8.
        R: Row blocks.
        HAS_SUMS: Whether `sums` are wanted.
        USE_PTX: Of `multiply_step`.

    Returns:
        acc and sums.
    """
    b0 = b.to(tl.int32)
    b1 = (b >> 32).to(tl.int32)
    if HAS_SUMS:
        zero = tl.zeros_like(b0)
        c = (sums[2 * UNIT], sums[2 * UNIT + 1], zero, zero)
        d = multiply_step((zero + 0x01010101,) * 4, b0, b1, c, USE_PTX)
        sums = replace_items(sums, (d[0], d[1]), 2 * UNIT, 2)
    for r in tl.static_range(R):
        a = unpack_step(words[r], marker, STEP, BITS)
        d = multiply_step(a, b0, b1, four_items(acc, UNIT * R + r), USE_PTX)
        acc = replace_items(acc, d, 4 * (UNIT * R + r), 4)
    return acc, sums


@triton.jit
def load_planes(
    planes_at, unit_stride, left, FIRST: tl.constexpr, STEPS: tl.constexpr, NT: tl.constexpr
):
    """Activations of STEPS steps from the FIRST one on, those of a step together.

    Args:
        planes_at: int64 pointers [threads], this lane's planes of the first unit.
        unit_stride: int64 elements between units.
        left: NT int32 [threads], steps from there to the end for which this lane has planes.
        FIRST: Same.
        STEPS: Same.
        NT: Units.

    Returns:
        STEPS x NT int64 [threads].
    """
    planes = ()
    for i in tl.static_range(STEPS * NT):
        at = planes_at + (FIRST + i // NT) * 32 + i % NT * unit_stride
        planes += (tl.load(at, mask=left[i % NT] > FIRST + i // NT, other=0),)
    return planes


@triton.jit
def multiply_band(
    ahead,
    places,
    marker,
    group_ptr,
    group_rows,
    first_block,
    n_blocks,
    n_steps,
    planes_ptr,
    unit_stride,
    columns,
    weights,
    wk,
    lane,
    BITS: tl.constexpr,
    GROUPED: tl.constexpr,
    R: tl.constexpr,
    NT: tl.constexpr,
    WK: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
    IN_PLACE: tl.constexpr,
    PAST_L1: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Twice the products of R blocks of 16 rows and NT units of activations, this warp's share.

    Args:
        ahead: Of `load_ahead` at pair wk * U: loads that were started before others.
        places: Of `locate_blocks` at the same pair.
        marker: Of `unpack_step`.
        group_ptr: int32 [tiles of 128 columns, group_rows], fp16 scale and twice the zero point.
        group_rows: Rows of that array.
        first_block: int32 [threads], first row block of this warp.
        n_blocks: Row blocks of the band.
        n_steps: Steps of a row of blocks.
        planes_ptr: int64 [units, steps, 32], the int8 planes, at the band's first step.
        unit_stride: int64 elements between units.
        columns: NT masks [threads]: whose planes of a unit this lane loads.
        weights: Of `fold_planes`.
        wk: int32 [threads], which of the WK shares of the steps is this warp's.
        lane: int32 [threads], 0..31.
        BITS: 1, 2, 3, 4 or 8.
        GROUPED: A scale and zero point a row and tile; without it zero is mid-range, scale 1.
        R: Row blocks of a warp.
        NT: Units of two tokens.
        WK: Warps that share the steps.
        U: Pairs of steps loaded ahead.
        X_AHEAD: Whether their activations are loaded ahead too.
        IN_PLACE: Whether what is loaded takes the registers of what was just used: half of them,
            and nothing is copied, but the compiler loads later.
        PAST_L1: Of `load_pair`.
        USE_PTX: Of `multiply_step`.

    Returns:
        NT x R x 2 fp32 [threads], rows g and g + 8 of each block.
    """
    zero = tl.zeros_like(lane)
    n_pairs = (n_steps + 1) // 2
    needs_sums: tl.constexpr = needs_ones(BITS, GROUPED)
    totals = (zero.to(tl.float32),) * (NT * R * 2)
    acc = (zero,) * (NT * R * 4)
    sums = (zero,) * (NT * 2)
    # Steps from this warp's next one to the end; none for lanes whose planes do not exist.
    left = n_steps - 2 * U * wk
    own_left = ()
    for unit in tl.static_range(NT):
        own_left += (tl.where(columns[unit], left, 0),)
    planes_at = planes_ptr + 2 * U * 32 * wk + lane
    planes = ()
    if X_AHEAD:
        planes = load_planes(planes_at, unit_stride, own_left, 0, 2 * U, NT)
    for start in range(0, n_pairs, WK * U):
        words = ahead
        present = planes
        places = move_blocks(places, WK * U, BITS)
        left -= 2 * WK * U
        next_at = planes_at + 2 * WK * U * 32
        next_left = add_to_items(own_left, -2 * WK * U)
        if not IN_PLACE:
            ahead = load_ahead(places, left, BITS, U, PAST_L1)
            if X_AHEAD:
                planes = load_planes(next_at, unit_stride, next_left, 0, 2 * U, NT)
        for u in tl.static_range(U):
            pair = start + wk * U + u
            for step in tl.static_range(2):
                if X_AHEAD:
                    own = present[(2 * u + step) * NT : (2 * u + step + 1) * NT]
                else:
                    own = load_planes(planes_at, unit_stride, own_left, 2 * u + step, 1, NT)
                for unit in tl.static_range(NT):
                    acc, sums = multiply_unit(
                        acc, sums, words[u * R : u * R + R], marker, own[unit],
                        step, unit, BITS, R, needs_sums, USE_PTX,
                    )  # fmt: skip
                if IN_PLACE and X_AHEAD:
                    fresh = load_planes(next_at, unit_stride, next_left, 2 * u + step, 1, NT)
                    planes = replace_items(planes, fresh, (2 * u + step) * NT, NT)
            if IN_PLACE:
                later = load_blocks(places, left, u, BITS, PAST_L1)
                ahead = replace_blocks(ahead, later, u, BITS)
            if GROUPED:
                for unit in tl.static_range(NT):
                    ones = (sums[2 * unit], sums[2 * unit + 1])
                    for r in tl.static_range(R):
                        c = four_items(acc, unit * R + r)
                        mask = (pair < n_pairs) & (first_block + r < n_blocks)
                        for half in tl.static_range(2):
                            row = (first_block + r) * 16 + lane // 4 + 8 * half
                            at = group_ptr + pair // 2 * group_rows + row
                            word = tl.load(at, mask=mask, other=0)
                            scale = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                            twice_zero = (word >> 16) & 511
                            term = scale * fold_planes(
                                c, ones, twice_zero, weights, half, BITS, True
                            )
                            term += totals[2 * (unit * R + r) + half]
                            totals = replace_items(totals, (term,), 2 * (unit * R + r) + half, 1)
                acc = (zero,) * (NT * R * 4)
                sums = (zero,) * (NT * 2)
        planes_at = next_at
        own_left = next_left
    if not GROUPED:
        totals = ()
        for unit in tl.static_range(NT):
            own = (sums[2 * unit], sums[2 * unit + 1])
            for r in tl.static_range(R):
                c = four_items(acc, unit * R + r)
                for half in tl.static_range(2):
                    totals += (fold_planes(c, own, 0, weights, half, BITS, False),)
    return totals
