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
from kernels.triton_ops.fold import fold_planes, fold_tiles, needs_ones
from kernels.triton_ops.items import add_to_items, four_items, replace_items


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
                pair = start + wk * U + u
                totals = fold_tiles(
                    totals, acc, sums, group_ptr + pair // 2 * group_rows, pair < n_pairs,
                    first_block, n_blocks, weights, lane, BITS, R, NT,
                )  # fmt: skip
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
