"""Decode for many tenants in one launch: shrink and expand over an arena."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import directory
from kernels.triton_ops.bits import transpose_bits
from kernels.triton_ops.mma import words_of_pair
from kernels.triton_ops.prepare import largest_number, place_words, round_to_int
from kernels.triton_ops.record_products import (
    finish_record,
    finish_turn,
    order_shares,
    row_of_share,
    scale_shares,
    sum_part,
)
from kernels.triton_ops.records import (
    EXPAND_PARTS,
    EXPAND_RECORDS,
    MAX_OUTPUTS,
    MAX_RECORDS,
    PART_INTS,
    RECORD_INTS,
    SHRINK_RECORDS,
    begin_products,
    count_turns,
    find_block,
    load_bound,
    load_pointer,
    load_record,
    load_sums,
    locate_source,
    start_record,
)

INPUT = tl.constexpr(directory.SOURCE_INPUT)


@triton.jit
def load_target(record_ptr):
    """Where a band's hidden values go: first word, words of a tile, bits, words of zeros."""
    return (
        tl.load(record_ptr + 11),
        tl.load(record_ptr + 12),
        tl.load(record_ptr + 13),
        tl.load(record_ptr + 14),
    )


@triton.jit
def store_hidden(
    h,
    target,
    target_ptr,
    sums_ptr,
    block,
    n_rows,
    lane,
    N_PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
    USE_PTX: tl.constexpr,
) -> None:
    """Write ROWS hidden values of a band as bits, once for each bit of the codes they meet.

    Args:
        h: int32 [ROWS], 0 beyond the band; bits that the last copy shifts out are 0.
        target: Of `load_target`.
        target_ptr: int32, the token's hidden values.
        sums_ptr: int64, sums of each word of them.
        block: Number of these rows among those of the band.
        n_rows: Rows of the band.
        lane: int32 [THREADS], 0..31.
        N_PLANES: Bytes of a number.
        ROWS: A multiple of 32, and a divisor of THREADS.
        THREADS: Of the program.
        USE_PTX: Of `transpose_bits`.
    """
    tl.static_assert(ROWS % 32 == 0 and THREADS % ROWS == 0)
    COPIES: tl.constexpr = THREADS // ROWS
    first, tile, n_bits, n_zeros = target
    thread = tl.arange(0, THREADS)
    values = tl.reshape(h[None, :] + tl.zeros((COPIES, ROWS), dtype=tl.int32), (THREADS,))
    # Sums of 32 values, in all of their lanes.
    whole = tl.sum(tl.reshape(values, (THREADS // 32, 32)).to(tl.int64), axis=1)[:, None]
    whole = tl.reshape(whole + tl.zeros((THREADS // 32, 32), dtype=tl.int64), (THREADS,))
    group = block * (ROWS // 32) + thread % ROWS // 32
    n_groups = (n_rows + 31) // 32
    word = first + group // 4 * tile + group % 4 * n_bits
    # The last words of a record fill its last pair.
    n_words = n_bits + tl.where(group == n_groups - 1, n_zeros, 0)
    for start in range(0, n_bits + n_zeros, COPIES):
        bit = start + thread // ROWS
        shift = tl.minimum(bit, 31)
        shifted = tl.where(bit < n_bits, values >> shift, 0)
        bits = transpose_bits(shifted, lane, USE_PTX)
        exists = (group < n_groups) & (bit < n_words)
        at = target_ptr + place_words(word + bit, lane, N_PLANES)
        tl.store(at, bits, mask=exists & (lane < 8 * N_PLANES))
        share = tl.where(bit < n_bits, whole >> shift.to(tl.int64), 0)
        tl.store(sums_ptr + word + bit, share, mask=exists & (lane == 0))


@triton.jit(
    do_not_specialize=["planes_stride", "n_inputs", "hidden_stride", "slot_stride", "site_offset"]
)
def batch_shrink_kernel(
    planes_ptr,
    planes_stride,
    step_ptr,
    norm_ptr,
    sums_ptr,
    n_inputs,
    hidden_ptr,
    hidden_stride,
    hidden_sums_ptr,
    table_ptr,
    directory_ptr,
    slot_stride,
    site_offset,
    slot_ptr,
    P: tl.constexpr,
    SUMS: tl.constexpr,
    IS_PLAIN: tl.constexpr,
    R: tl.constexpr,
    WK: tl.constexpr,
    WR: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    TURNS: tl.constexpr,
    USE_PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """TURNS blocks of rows of V for one token: hidden = bits of V x."""
    ROWS: tl.constexpr = 16 * R * WR
    THREADS: tl.constexpr = 32 * WK * WR
    if OVERLAP:
        gdc_launch_dependents()
    place = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + place)
    if slot >= 0:
        entry_ptr = directory_ptr + slot.to(tl.int64) * slot_stride + site_offset
        number, own = find_block(entry_ptr, tl.program_id(0), ROWS * TURNS)
        if number < MAX_RECORDS:
            slab = tl.load(table_ptr + slot)
            thread = tl.arange(0, THREADS)
            lane = thread % 32
            wk = thread // 32 % WK
            record_ptr = entry_ptr + SHRINK_RECORDS + number * RECORD_INTS
            fields = load_record(record_ptr)
            first_block = (own * TURNS * WR + thread // 32 // WK) * R
            started = start_record(fields, slab, first_block, wk, lane, R, U, STAGES)
            # Loads that only the last lines need start here, beside the codes.
            factors_ptr = load_pointer(slab, fields[5], tl.float32)
            target = load_target(record_ptr)
            n_turns = count_turns(fields, own, R, WR, TURNS)
            source_ptr = planes_ptr + place * planes_stride
            if OVERLAP:
                gdc_wait()
            shares = load_sums(sums_ptr + place * n_inputs, n_inputs, fields, SUMS)
            # A unit of a product, over one of a hidden value whose last copy's bits are 0.
            worth = 0.5 * tl.load(step_ptr + place) / tl.load(norm_ptr + place)
            worth = worth / load_bound(fields) * largest_number(P) / (1 << target[2] - 1)
            source_at = locate_source(fields, source_ptr, lane, P)
            begun = ((), ())
            if TURNS > 1:
                begun = begin_products(started[1], fields, source_at, wk, P, U, X_AHEAD)
            for turn in range(n_turns if TURNS > 1 else 1):
                block = own * TURNS + turn
                row = row_of_share(block, R, WR)  # [WR, 8, 2 R]
                factor = tl.load(factors_ptr + row, mask=row < fields[2], other=0.0)
                if TURNS > 1:
                    products, begun = finish_turn(
                        begun, turn, n_turns, fields, shares, slab, first_block, source_at,
                        wk, lane, R, P, WK, WR, U, X_AHEAD, USE_PTX,
                    )  # fmt: skip
                else:
                    products = finish_record(
                        started, fields, shares, slab, first_block, source_ptr, wk, lane,
                        IS_PLAIN, R, P, WK, WR, U, X_AHEAD, STAGES, USE_PTX,
                    )  # fmt: skip
                h = round_to_int(products * factor * worth) << target[2] - 1
                store_hidden(
                    order_shares(h, R, WR), target, hidden_ptr + place * hidden_stride,
                    hidden_sums_ptr + place * (hidden_stride // words_of_pair(P) * 4), block,
                    fields[2], lane, P, ROWS, THREADS, USE_PTX,
                )  # fmt: skip
    # Programs without work wait too: who waits for this launch means the ones before it as well.
    if OVERLAP:
        gdc_wait()


@triton.jit(
    do_not_specialize=[
        "planes_stride",
        "n_inputs",
        "hidden_stride",
        "slot_stride",
        "site_offset",
        "y_stride",
    ]
)
def batch_expand_kernel(
    planes_ptr,
    planes_stride,
    step_ptr,
    norm_ptr,
    sums_ptr,
    n_inputs,
    hidden_ptr,
    hidden_stride,
    hidden_sums_ptr,
    table_ptr,
    directory_ptr,
    slot_stride,
    site_offset,
    slot_ptr,
    token_ptr,
    y_ptr,
    y_stride,
    P: tl.constexpr,
    SUMS: tl.constexpr,
    IS_PLAIN: tl.constexpr,
    HAS_DIRECT: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    R: tl.constexpr,
    WK: tl.constexpr,
    WR: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    TURNS: tl.constexpr,
    USE_PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """TURNS blocks of outputs for one token: y += U h, or D x."""
    ROWS: tl.constexpr = 16 * R * WR
    place = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + place)
    if slot >= 0:
        entry_ptr = directory_ptr + slot.to(tl.int64) * slot_stride + site_offset
        number, own = find_block(entry_ptr + MAX_RECORDS, tl.program_id(0), ROWS * TURNS)
        if number < MAX_RECORDS:
            slab = tl.load(table_ptr + slot)
            part_ptr = entry_ptr + EXPAND_PARTS + number * PART_INTS
            record_ptr = entry_ptr + EXPAND_RECORDS + number * (MAX_OUTPUTS * RECORD_INTS)
            fields = load_record(record_ptr)
            thread = tl.arange(0, 32 * WK * WR)
            lane = thread % 32
            wk = thread // 32 % WK
            first_block = (own * TURNS * WR + thread // 32 // WK) * R
            started = start_record(fields, slab, first_block, wk, lane, R, U, STAGES)
            source_ptr = hidden_ptr
            stride = hidden_stride
            own_sums_ptr = hidden_sums_ptr
            sums_stride = hidden_stride // words_of_pair(P) * 8
            n_own = 0 * n_inputs
            is_direct = tl.load(part_ptr + 1) == INPUT
            if HAS_DIRECT:
                if is_direct:
                    source_ptr = planes_ptr
                    stride = planes_stride
                    own_sums_ptr = sums_ptr
                    sums_stride = n_inputs
                    n_own = n_inputs
            token = tl.load(token_ptr + place).to(tl.int64)
            part_at = y_ptr + token * y_stride + tl.load(part_ptr)
            n_records = tl.load(part_ptr + 2)
            n_turns = count_turns(fields, own, R, WR, TURNS)
            if OVERLAP:
                gdc_wait()
            # What the last lines need is loaded beside the codes.
            hidden_worth = tl.load(norm_ptr + place) / largest_number(P)
            worth = 0.5 * tl.where(is_direct, tl.load(step_ptr + place), hidden_worth)
            source_ptr += place * stride
            own_sums_ptr += place * sums_stride
            source_at = locate_source(fields, source_ptr, lane, P)
            begun = ((), ())
            shares = tl.zeros((SUMS,), dtype=tl.int64)
            if TURNS > 1:
                shares = load_sums(own_sums_ptr, n_own, fields, SUMS)
                begun = begin_products(started[1], fields, source_at, wk, P, U, X_AHEAD)
            for turn in range(n_turns if TURNS > 1 else 1):
                block = own * TURNS + turn
                row = row_of_share(block, R, WR)  # [WR, 8, 2 R]
                y = tl.load(part_at + row, mask=row < fields[2], other=0.0).to(tl.float32)
                if TURNS > 1:
                    products, begun = finish_turn(
                        begun, turn, n_turns, fields, shares, slab, first_block, source_at,
                        wk, lane, R, P, WK, WR, U, X_AHEAD, USE_PTX,
                    )  # fmt: skip
                    sums = scale_shares(products, fields, slab, block, HAS_FACTORS, R, WR)
                else:
                    sums = sum_part(
                        started, fields, record_ptr, n_records, own_sums_ptr, n_own, slab,
                        block, first_block, source_ptr, wk, lane, SUMS, IS_PLAIN,
                        HAS_FACTORS, R, P, WK, WR, U, X_AHEAD, STAGES, USE_PTX,
                    )  # fmt: skip
                y += worth * sums
                tl.store(part_at + row, y.to(y_ptr.dtype.element_ty), mask=row < fields[2])
    if OVERLAP:
        gdc_wait()
