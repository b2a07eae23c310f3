"""Decode for many tenants in one launch: prepare, shrink and expand over an arena."""

import triton
import triton.language as tl

from kernels.directory import SOURCE_INPUT
from kernels.triton_ops.records import (
    EXPAND_PARTS,
    EXPAND_RECORDS,
    MAX_RECORDS,
    PART_INTS,
    RECORD_INTS,
    SHRINK_RECORDS,
    add_shares,
    find_block,
    load_pointer,
    multiply_record,
    row_of_share,
)

INPUT = tl.constexpr(SOURCE_INPUT)
# Largest whole number of an activation: four signed digits of 8 bits, or two.
LARGEST = tl.constexpr(1 << 30)
LARGEST_FAST = tl.constexpr(32512)
LEAST = tl.constexpr(1e-20)


@triton.jit
def store_planes(at, value, mask, N_PLANES: tl.constexpr):
    """Write whole numbers as signed digits of 8 bits, the highest first, 32 bytes apart.

    Args:
        at: Pointers to the highest digit, int8.
        value: int32 of their shape.
        mask: What to write.
        N_PLANES: Digits.
    """
    for plane in tl.static_range(N_PLANES):
        digit = (value << 24) >> 24
        tl.store(at + 32 * (N_PLANES - 1 - plane), digit.to(tl.int8), mask=mask)
        value = (value - digit) >> 8


@triton.jit
def round_to_int(value) -> tl.tensor:
    """Nearest whole number, halves away from zero; |value| < 2^31."""
    return (value + tl.where(value < 0, -0.5, 0.5)).to(tl.int32)


@triton.jit(do_not_specialize=["n_cols", "n_steps", "x_stride"])
def prepare_kernel(
    x_ptr,
    x_stride,
    group_tokens_ptr,
    planes_ptr,
    step_ptr,
    norm_ptr,
    n_cols,
    n_steps,
    N_PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One token: x [n_cols] as int8 planes, the worth of a unit, and its length."""
    place = tl.program_id(0)
    token = tl.load(group_tokens_ptr + place)
    if token >= 0:
        col = tl.arange(0, BLOCK)
        x_at = x_ptr + token.to(tl.int64) * x_stride + col
        x = tl.load(x_at, mask=col < n_cols, other=0.0).to(tl.float32)
        # Zeros must not divide by zero: a token of them has the length of the least one.
        largest = tl.maximum(tl.max(tl.abs(x), axis=0), LEAST)
        norm = largest * tl.sqrt(tl.sum((x / largest) * (x / largest), axis=0))
        units = LARGEST if N_PLANES == 4 else LARGEST_FAST  # noqa: PLR2004 planes
        tl.store(step_ptr + place, largest / units)
        tl.store(norm_ptr + place, tl.maximum(norm, LEAST))
        column = place % 2 * 4
        at = planes_ptr + (((place // 2).to(tl.int64) * n_steps + col // 32) * 8 + column) * 32
        value = round_to_int(x * (units / largest))
        store_planes(at + col % 32, value, col < n_steps * 32, N_PLANES)


@triton.jit
def mask_columns(lane, count, NT: tl.constexpr, P: tl.constexpr):
    """NT masks [threads] of `multiply_band`: planes of tokens that exist."""
    columns = ()
    for unit in tl.static_range(NT):
        columns += ((lane // 4 % 4 < P) & (2 * unit + lane // 16 < count),)
    return columns


@triton.jit
def weigh_planes(lane, P: tl.constexpr):
    """Two fp32 [threads], what a unit of this lane's planes is worth."""
    low = lane % 2 == 1
    if P == 4:  # noqa: PLR2004 planes
        weights = (tl.where(low, 256.0, 16777216.0), tl.where(low, 1.0, 65536.0))
    else:
        weights = (tl.where(low, 0.0, 256.0), tl.where(low, 0.0, 1.0))
    return weights


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
    HAS_GROUPS: tl.constexpr,
    R: tl.constexpr,
    NT: tl.constexpr,
    WK: tl.constexpr,
    WR: tl.constexpr,
    U: tl.constexpr,
    USE_PTX: tl.constexpr,
) -> None:
    """One block of rows of V for one group of tokens of a tenant: hidden = planes of V x."""
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
            totals = multiply_record(
                record_ptr, slab, (block * WR + wr) * R,
                planes_ptr + group.to(tl.int64) * NT * x_steps * 32, x_steps * 32,
                columns, weights, wk, lane, WIDTHS, HAS_GROUPS, R, NT, WK, U, USE_PTX,
            )  # fmt: skip
            row = row_of_share(block, R, WR)  # [WR, 8, 1, 2 R]
            n_rows = tl.load(record_ptr + 3)
            factors_ptr = load_pointer(slab, tl.load(record_ptr + 6), tl.float32)
            factor = 0.5 * tl.load(factors_ptr + row, mask=row < n_rows, other=0.0)
            part_ptr = entry_ptr + EXPAND_PARTS + tl.load(record_ptr + 9) * PART_INTS
            bound = tl.load(part_ptr + 3).to(tl.float32, bitcast=True)
            # A band is read in whole steps: the rows that fill its last one are written as 0.
            inside = row < (n_rows + 31) // 32 * 32
            first_step = tl.load(record_ptr + 8)
            token = tl.arange(0, 2)[None, None, :, None]
            for unit in tl.static_range(NT):
                place = (group * NT + unit) * 2 + token
                exists = 2 * unit + token < count
                worth = tl.load(step_ptr + place, mask=exists, other=0.0)
                worth /= tl.load(norm_ptr + place, mask=exists, other=1.0) * bound
                h = add_shares(totals, unit, R, WK, WR) * factor * (worth * LARGEST)
                step = (group * NT + unit).to(tl.int64) * h_steps + first_step + row // 32
                at = hidden_ptr + (step * 8 + 4 * token) * 32 + row % 32
                store_planes(at, round_to_int(h), inside & exists, 4)


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
    HAS_GROUPS: tl.constexpr,
    HAS_DIRECT: tl.constexpr,
    R: tl.constexpr,
    NT: tl.constexpr,
    WK: tl.constexpr,
    WR: tl.constexpr,
    U: tl.constexpr,
    USE_PTX: tl.constexpr,
) -> None:
    """One block of outputs for one group of tokens of a tenant: y += U h, or D x."""
    group = tl.program_id(1)
    slot = tl.load(group_slot_ptr + group)
    if slot >= 0:
        entry_ptr = directory_ptr + slot.to(tl.int64) * slot_stride + site_offset
        number, block = find_block(entry_ptr + MAX_RECORDS, tl.program_id(0), 16 * R * WR)
        if number < MAX_RECORDS:
            count = tl.load(group_count_ptr + group)
            slab = tl.load(table_ptr + slot)
            part_ptr = entry_ptr + EXPAND_PARTS + number * PART_INTS
            n_records = tl.load(part_ptr)
            record_ptr = entry_ptr + EXPAND_RECORDS + tl.load(part_ptr + 1) * RECORD_INTS
            bound = tl.load(part_ptr + 3).to(tl.float32, bitcast=True)
            n_rows = tl.load(entry_ptr + MAX_RECORDS + number)
            thread = tl.arange(0, 32 * WK * WR)
            lane = thread % 32
            wk = thread // 32 % WK
            wr = thread // 32 // WK
            columns = mask_columns(lane, count, NT, 4)
            weights = weigh_planes(lane, 4)
            source_ptr = hidden_ptr + group.to(tl.int64) * NT * h_steps * 32
            stride = h_steps * 32
            is_direct = tl.load(part_ptr + 4) == INPUT
            if HAS_DIRECT:
                if is_direct:
                    source_ptr = planes_ptr + group.to(tl.int64) * NT * x_steps * 32
                    stride = x_steps * 32
                    columns = mask_columns(lane, count, NT, P)
                    weights = weigh_planes(lane, P)
            totals = (tl.zeros_like(lane).to(tl.float32),) * (NT * R * 2)
            for _ in range(n_records):
                first_block = (block * WR + wr) * R
                products = multiply_record(
                    record_ptr, slab, first_block,
                    source_ptr + tl.load(record_ptr + 8).to(tl.int64) * 32, stride,
                    columns, weights, wk, lane, WIDTHS, HAS_GROUPS, R, NT, WK, U, USE_PTX,
                )  # fmt: skip
                factors = tl.load(record_ptr + 6)
                factors_ptr = load_pointer(slab, factors, tl.float32)
                scaled = ()
                for i in tl.static_range(NT * R * 2):
                    row = (first_block + i // 2 % R) * 16 + lane // 4 + 8 * (i % 2)
                    mask = (factors > 0) & (row < n_rows)
                    factor = tl.load(factors_ptr + row, mask=mask, other=1.0)
                    scaled += (totals[i] + products[i] * factor,)
                totals = scaled
                record_ptr += RECORD_INTS
            row = row_of_share(block, R, WR)  # [WR, 8, 1, 2 R]
            row_at = y_ptr + tl.load(part_ptr + 2) + row
            token = tl.arange(0, 2)[None, None, :, None]
            for unit in tl.static_range(NT):
                place = (group * NT + unit) * 2 + token
                exists = 2 * unit + token < count
                hidden_worth = tl.load(norm_ptr + place, mask=exists, other=0.0) * bound / LARGEST
                input_worth = tl.load(step_ptr + place, mask=exists, other=0.0)
                worth = 0.5 * tl.where(is_direct, input_worth, hidden_worth)
                delta = add_shares(totals, unit, R, WK, WR) * worth
                at_token = tl.load(group_tokens_ptr + place, mask=exists, other=0).to(tl.int64)
                at = row_at + at_token * y_stride
                mask = exists & (row < n_rows)
                y = tl.load(at, mask=mask, other=0.0).to(tl.float32) + delta
                tl.store(at, y.to(y_ptr.dtype.element_ty), mask=mask)
