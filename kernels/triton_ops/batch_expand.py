"""Second stage of a step: the deltas of all tokens, in one launch over an arena."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from kernels import directory
from kernels.triton_ops.mma import words_of_pair
from kernels.triton_ops.prepare import largest_number
from kernels.triton_ops.record_products import (
    count_read,
    finish_turn,
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
    ZERO_WORDS,
    begin_products,
    count_turns,
    find_block,
    load_group,
    load_record,
    load_sums,
    locate_source,
    locate_tokens,
    place_threads,
    start_record,
)

INPUT = tl.constexpr(directory.SOURCE_INPUT)


@triton.jit
def expand_rows(
    program,
    place,
    count,
    slot,
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
    entry_ptr,
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
    NARROW: tl.constexpr,
    TURNS: tl.constexpr,
    TOKENS: tl.constexpr,
    USE_PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Add TURNS blocks of outputs to the tokens of a program.

    Arguments are those of `shrink_rows`, with hidden_ptr int64, what that wrote, and of
    `launch_expand`: rows of y [tokens, y_stride] at token_ptr, int32 [places].
    """
    ROWS: tl.constexpr = 16 * R * WR
    number, own = find_block(entry_ptr + MAX_RECORDS, program, count, ROWS * TURNS)
    if number < MAX_RECORDS:
        slab = tl.load(table_ptr + slot)
        part_ptr = entry_ptr + EXPAND_PARTS + number * PART_INTS
        record_ptr = entry_ptr + EXPAND_RECORDS + number * (MAX_OUTPUTS * RECORD_INTS)
        fields = load_record(record_ptr)
        lane, wk, first_block, token = place_threads(own * TURNS, count, R, WK, WR)
        started = ()
        if IS_PLAIN:
            started = start_record(fields, slab, first_block, wk, lane, R, U, USE_PTX)
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
        first_row = tl.load(part_ptr)
        n_records = tl.load(part_ptr + 2)
        width = R * (WR // count)
        n_turns = count_turns(fields, own, width, TURNS)
        at, sums_at = locate_tokens(place, count, WR, TOKENS)
        y_row = tl.load(token_ptr + at).to(tl.int64)
        outputs = y_ptr + y_row * y_stride + first_row
        source_ptr += (place + token) * stride
        own_sums_ptr += sums_at * sums_stride
        if OVERLAP:
            gdc_wait()
        hidden_worth = tl.load(norm_ptr + at) / largest_number(P)
        worth = 0.5 * tl.where(is_direct, tl.load(step_ptr + at), hidden_worth)
        source = locate_source(fields, source_ptr, planes_ptr - ZERO_WORDS, lane, P)
        sums = 0
        begun = ((), (), ())
        if IS_PLAIN:
            sums = load_sums(own_sums_ptr, n_own, fields, SUMS)
            begun = begin_products(started, fields, source, wk, P, U, X_AHEAD)
            if TURNS > 1:
                sums = count_read(sums, fields[0])
        for turn in range(n_turns if TURNS > 1 else 1):
            block = own * TURNS + turn
            row = row_of_share(block, count, R, WR)
            # What the last lines need is loaded beside the codes.
            y = tl.load(outputs + row, mask=row < fields[2], other=0.0).to(tl.float32)
            if IS_PLAIN:
                products, begun = finish_turn(
                    begun, turn, n_turns, fields, sums, slab, first_block, width, source, wk,
                    lane, R, P, WK, WR, U, X_AHEAD, NARROW, TURNS > 1, USE_PTX,
                )  # fmt: skip
                products = scale_shares(products, fields, slab, row, HAS_FACTORS)
            else:
                products = sum_part(
                    started, fields, record_ptr, n_records, own_sums_ptr, n_own, slab, block,
                    first_block, source_ptr, planes_ptr - ZERO_WORDS, wk, lane, SUMS, False,
                    HAS_FACTORS, R, P, WK, WR, U, X_AHEAD, NARROW, USE_PTX,
                )  # fmt: skip
            y += worth * products
            tl.store(outputs + row, y.to(y_ptr.dtype.element_ty), mask=row < fields[2])


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
    count_ptr,
    number_ptr,
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
    NARROW: tl.constexpr,
    TURNS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOKENS_FIRST: tl.constexpr,
    USE_PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """TURNS blocks of outputs for up to TOKENS tokens of a tenant: y += U h, or D x."""
    place = tl.program_id(0 if TOKENS_FIRST else 1).to(tl.int64)
    program = tl.program_id(1 if TOKENS_FIRST else 0)
    slot = tl.load(slot_ptr + place)
    if slot >= 0:
        entry_ptr = directory_ptr + slot.to(tl.int64) * slot_stride + site_offset
        count, number = load_group(count_ptr + place, number_ptr + place, TOKENS)
        expand_rows(
            program * count + number, place - number, count, slot, planes_ptr, planes_stride,
            step_ptr, norm_ptr, sums_ptr, n_inputs, hidden_ptr, hidden_stride, hidden_sums_ptr,
            table_ptr, entry_ptr, token_ptr, y_ptr, y_stride, P, SUMS, IS_PLAIN, HAS_DIRECT,
            HAS_FACTORS, R, WK, WR, U, X_AHEAD, NARROW, TURNS, TOKENS, USE_PTX, OVERLAP,
        )  # fmt: skip
    if OVERLAP:
        gdc_wait()
