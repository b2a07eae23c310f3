"""Decode for many tenants in one launch: prepare, shrink and expand over an arena."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import directory
from kernels.triton_ops.parts import finish_part, mask_columns, start_part, weigh_planes
from kernels.triton_ops.records import (
    EXPAND_PARTS,
    EXPAND_RECORDS,
    MAX_RECORDS,
    N_WIDTHS,
    PART_INTS,
    RECORD_INTS,
    SHRINK_RECORDS,
    add_shares,
    find_block,
    finish_record,
    load_pointer,
    load_record,
    row_of_share,
    start_record,
)

INPUT = tl.constexpr(directory.SOURCE_INPUT)
ENTRY_INTS = tl.constexpr(directory.ENTRY_INTS)
ENTRY_ROOM = tl.constexpr(2048)
LEAST = tl.constexpr(1e-20)


@triton.constexpr_function
def largest_number(n_planes):
    """Largest whole number of an activation or hidden value, in signed digits of 8 bits."""
    return 1 << 30 if n_planes == 4 else 32512  # noqa: PLR2004 planes


@triton.constexpr_function
def carry_of_digits(n_planes):
    """What makes the bytes of a whole number, once added and once flipped, its signed digits."""
    return sum(0x80 << 8 * plane for plane in range(n_planes - 1))


@triton.jit
def store_planes(at, value, mask, N_PLANES: tl.constexpr):
    """Write whole numbers as signed digits of 8 bits, the highest first, 32 bytes apart.

    Args:
        at: Pointers to the highest digit, int8.
        value: int32 of their shape.
        mask: What to write.
        N_PLANES: Digits.
    """
    digits = (value + carry_of_digits(N_PLANES)) ^ carry_of_digits(N_PLANES)
    for plane in tl.static_range(N_PLANES):
        digit = (digits >> (8 * (N_PLANES - 1 - plane))).to(tl.int8)
        tl.store(at + 32 * plane, digit, mask=mask)


@triton.jit
def round_to_int(value) -> tl.tensor:
    """Nearest whole number, halves away from zero; |value| < 2^31."""
    return (value + tl.where(value < 0, -0.5, 0.5)).to(tl.int32)


@triton.jit(
    do_not_specialize=["n_cols", "n_steps", "x_stride", "slot_stride", "site_offset", "n_cleared"]
)
def prepare_kernel(
    x_ptr,
    x_stride,
    group_tokens_ptr,
    group_slot_ptr,
    planes_ptr,
    step_ptr,
    norm_ptr,
    n_cols,
    n_steps,
    directory_ptr,
    slot_stride,
    site_offset,
    cleared_ptr,
    n_cleared,
    GROUP_TOKENS: tl.constexpr,
    N_PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """One token: x [n_cols] as int8 planes, the worth of a unit, and its length.

    Also clears n_cleared elements of the token, and touches the directory so that the kernels
    that follow find it in the cache.
    """
    if OVERLAP:
        # A kernel that starts early reads the plan before it waits: nothing may still write it.
        gdc_wait()
        gdc_launch_dependents()
    place = tl.program_id(0)
    token = tl.load(group_tokens_ptr + place)
    if token >= 0:
        slot = tl.load(group_slot_ptr + place // GROUP_TOKENS)
        entry = tl.arange(0, ENTRY_ROOM)
        entry_ptr = directory_ptr + slot.to(tl.int64) * slot_stride + site_offset
        tl.load(entry_ptr + entry, mask=entry < ENTRY_INTS, other=0, volatile=True)
        col = tl.arange(0, BLOCK)
        x_at = x_ptr + token.to(tl.int64) * x_stride + col
        x = tl.load(x_at, mask=col < n_cols, other=0.0).to(tl.float32)
        for start in range(0, n_cleared, BLOCK):
            at = cleared_ptr + token.to(tl.int64) * n_cleared + start + col
            tl.store(at, tl.zeros_like(x), mask=start + col < n_cleared)
        # Zeros must not divide by zero: a token of them has the length of the least one.
        largest = tl.maximum(tl.max(tl.abs(x), axis=0), LEAST)
        norm = largest * tl.sqrt(tl.sum((x / largest) * (x / largest), axis=0))
        units: tl.constexpr = largest_number(N_PLANES)
        unit_tokens: tl.constexpr = 8 // N_PLANES
        tl.store(step_ptr + place, largest / units)
        tl.store(norm_ptr + place, tl.maximum(norm, LEAST))
        column = place % unit_tokens * N_PLANES
        step = (place // unit_tokens).to(tl.int64) * n_steps + col // 32
        at = planes_ptr + (step * 8 + column) * 32
        value = round_to_int(x * (units / largest))
        store_planes(at + col % 32, value, col < n_steps * 32, N_PLANES)


@triton.jit(do_not_specialize=["x_steps", "h_steps", "slot_stride", "site_offset"])
def batch_shrink_kernel(
    planes_ptr,
    step_ptr,
    norm_ptr,
    x_steps,
    hidden_ptr,
    h_steps,
    table_ptr,
    directory_ptr,
    slot_stride,
    site_offset,
    group_slot_ptr,
    group_count_ptr,
    P: tl.constexpr,
    WIDTHS: tl.constexpr,
    GROUPING: tl.constexpr,
    R: tl.constexpr,
    NT: tl.constexpr,
    WK: tl.constexpr,
    WR: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
    IN_PLACE: tl.constexpr,
    PAST_L1: tl.constexpr,
    USE_PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """One block of rows of V for one group of tokens of a tenant: hidden = planes of V x."""
    TOKENS: tl.constexpr = 8 // P
    if OVERLAP:
        gdc_launch_dependents()
    group = tl.program_id(1)
    slot = tl.load(group_slot_ptr + group)
    if slot >= 0:
        entry_ptr = directory_ptr + slot.to(tl.int64) * slot_stride + site_offset
        number, block = find_block(entry_ptr, tl.program_id(0), 16 * R * WR)
        if number < MAX_RECORDS:
            count = tl.load(group_count_ptr + group)
            slab = tl.load(table_ptr + slot)
            thread = tl.arange(0, 32 * WK * WR)
            lane = thread % 32
            wk = thread // 32 % WK
            wr = thread // 32 // WK
            columns = mask_columns(lane, count, NT, P)
            weights = weigh_planes(lane, P)
            record_ptr = entry_ptr + SHRINK_RECORDS + number * RECORD_INTS
            # Loads that only the last lines need start here, beside the codes.
            bits = tl.load(record_ptr)
            fields = load_record(record_ptr)
            row = row_of_share(block, R, WR)  # [WR, 8, 1, 2 R]
            n_rows = fields[2]
            factors_ptr = load_pointer(slab, fields[5], tl.float32)
            factor = tl.load(factors_ptr + row, mask=row < n_rows, other=0.0)
            first_step = fields[7]
            bound = fields[8].to(tl.float32, bitcast=True)
            first_block = (block * WR + wr) * R
            source_ptr = planes_ptr + group.to(tl.int64) * NT * x_steps * 32
            totals = (tl.zeros_like(lane).to(tl.float32),) * (NT * R * 2)
            for width in tl.static_range(1, 9):
                if (WIDTHS >> width) & 1:
                    if bits == width:
                        started = start_record(
                            fields, slab, first_block, wk, lane, width, R, U, PAST_L1
                        )
                        if OVERLAP:
                            gdc_wait()
                        totals = finish_record(
                            started, slab, first_block, source_ptr, x_steps * 32, columns,
                            weights, wk, lane, width, GROUPING, R, NT, WK, U,
                            X_AHEAD, IN_PLACE, PAST_L1, USE_PTX,
                        )  # fmt: skip
            # A band is read in whole steps: the rows that fill its last one are written as 0.
            inside = row < (n_rows + 31) // 32 * 32
            token = tl.arange(0, TOKENS)[None, None, :, None]
            # All planes are one tensor: it changes its layout once, not once a plane.
            plane = tl.arange(0, P)[None, None, None, None, :]
            for unit in tl.static_range(NT):
                place = (group * NT + unit) * TOKENS + token
                exists = TOKENS * unit + token < count
                worth = 0.5 * tl.load(step_ptr + place, mask=exists, other=0.0)
                worth /= tl.load(norm_ptr + place, mask=exists, other=1.0) * bound
                h = add_shares(totals, unit, P, R, WK, WR) * factor * (worth * largest_number(P))
                step = (group * NT + unit).to(tl.int64) * h_steps + first_step + row // 32
                at = hidden_ptr + (step * 8 + P * token) * 32 + row % 32
                digits = (round_to_int(h) + carry_of_digits(P)) ^ carry_of_digits(P)
                digit = (digits[:, :, :, :, None] >> (8 * (P - 1 - plane))).to(tl.int8)
                mask = (inside & exists)[:, :, :, :, None]
                tl.store(at[:, :, :, :, None] + 32 * plane, digit, mask=mask)
    # Programs without work wait too: who waits for this launch means the ones before it as well.
    if OVERLAP:
        gdc_wait()


@triton.jit(do_not_specialize=["x_steps", "h_steps", "slot_stride", "site_offset", "y_stride"])
def batch_expand_kernel(
    planes_ptr,
    step_ptr,
    norm_ptr,
    x_steps,
    hidden_ptr,
    h_steps,
    table_ptr,
    directory_ptr,
    slot_stride,
    site_offset,
    group_slot_ptr,
    group_count_ptr,
    group_tokens_ptr,
    y_ptr,
    y_stride,
    P: tl.constexpr,
    WIDTHS: tl.constexpr,
    GROUPING: tl.constexpr,
    HAS_DIRECT: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    R: tl.constexpr,
    NT: tl.constexpr,
    WK: tl.constexpr,
    WR: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
    IN_PLACE: tl.constexpr,
    PAST_L1: tl.constexpr,
    USE_PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """One block of outputs for one group of tokens of a tenant: y += U h, or D x."""
    TOKENS: tl.constexpr = 8 // P
    group = tl.program_id(1)
    slot = tl.load(group_slot_ptr + group)
    if slot >= 0:
        entry_ptr = directory_ptr + slot.to(tl.int64) * slot_stride + site_offset
        number, block = find_block(entry_ptr + MAX_RECORDS, tl.program_id(0), 16 * R * WR)
        if number < MAX_RECORDS:
            count = tl.load(group_count_ptr + group)
            slab = tl.load(table_ptr + slot)
            part_ptr = entry_ptr + EXPAND_PARTS + number * PART_INTS
            record_ptr = entry_ptr + EXPAND_RECORDS + number * (N_WIDTHS * RECORD_INTS)
            n_rows = tl.load(entry_ptr + MAX_RECORDS + number)
            thread = tl.arange(0, 32 * WK * WR)
            lane = thread % 32
            wk = thread // 32 % WK
            wr = thread // 32 // WK
            columns = mask_columns(lane, count, NT, P)
            weights = weigh_planes(lane, P)
            source_ptr = hidden_ptr + group.to(tl.int64) * NT * h_steps * 32
            stride = h_steps * 32
            is_direct = tl.load(part_ptr + 1) == INPUT
            if HAS_DIRECT:
                if is_direct:
                    source_ptr = planes_ptr + group.to(tl.int64) * NT * x_steps * 32
                    stride = x_steps * 32
            first_block = (block * WR + wr) * R
            started = start_part(record_ptr, slab, first_block, wk, lane, WIDTHS, R, U, PAST_L1)
            if OVERLAP:
                gdc_wait()
            row = row_of_share(block, R, WR)  # [WR, 8, 1, 2 R]
            row_at = y_ptr + tl.load(part_ptr) + row
            token = tl.arange(0, TOKENS)[None, None, :, None]
            # What the last lines need is loaded beside the codes.
            worths = ()
            outputs = ()
            for unit in tl.static_range(NT):
                place = (group * NT + unit) * TOKENS + token
                exists = TOKENS * unit + token < count
                norm = tl.load(norm_ptr + place, mask=exists, other=0.0)
                hidden_worth = norm / largest_number(P)
                input_worth = tl.load(step_ptr + place, mask=exists, other=0.0)
                worths += (0.5 * tl.where(is_direct, input_worth, hidden_worth),)
                at_token = tl.load(group_tokens_ptr + place, mask=exists, other=0).to(tl.int64)
                at = row_at + at_token * y_stride
                outputs += (tl.load(at, mask=exists & (row < n_rows), other=0.0).to(tl.float32),)
            totals = finish_part(
                started, record_ptr, slab, first_block, n_rows, source_ptr, stride,
                columns, weights, wk, lane, WIDTHS, GROUPING, HAS_FACTORS, R, NT, WK, U, X_AHEAD,
                IN_PLACE, PAST_L1, USE_PTX,
            )  # fmt: skip
            for unit in tl.static_range(NT):
                place = (group * NT + unit) * TOKENS + token
                exists = TOKENS * unit + token < count
                at_token = tl.load(group_tokens_ptr + place, mask=exists, other=0).to(tl.int64)
                at = row_at + at_token * y_stride
                y = outputs[unit] + add_shares(totals, unit, P, R, WK, WR) * worths[unit]
                tl.store(at, y.to(y_ptr.dtype.element_ty), mask=exists & (row < n_rows))
    if OVERLAP:
        gdc_wait()
