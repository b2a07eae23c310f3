"""First stage of a step: the hidden values of all tokens, in one launch over an arena."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton_ops.bits import transpose_bits
from kernels.triton_ops.mma import words_of_pair
from kernels.triton_ops.prepare import largest_number, place_words, round_to_int
from kernels.triton_ops.record_products import (
    count_read,
    finish_record,
    finish_turn,
    order_shares,
    row_of_share,
)
from kernels.triton_ops.records import (
    MAX_RECORDS,
    RECORD_INTS,
    SHRINK_RECORDS,
    ZERO_WORDS,
    begin_products,
    count_turns,
    find_block,
    load_bound,
    load_group,
    load_pointer,
    load_record,
    load_sums,
    locate_source,
    locate_tokens,
    place_threads,
    split_warps,
    start_record,
)


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
    strides,
    place,
    block,
    count,
    n_rows,
    lane,
    N_PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
    USE_PTX: tl.constexpr,
) -> None:
    """Write ROWS hidden values of a band as bits, once for each bit of the codes they meet.

    Args:
        h: int32 [ROWS], of `count` tokens; 0 beyond the band; bits that the last copy shifts out
            are 0.
        target: Of `load_target`.
        target_ptr: int32 [places, strides[0]], the hidden values.
        sums_ptr: int64 [places, strides[1]], sums of each word of them.
        strides: Those two.
        place: Of the first token.
        block: Number of these rows among those of the band.
        count: Of `split_warps`, which shares the 32s of rows here.
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
    token, group = split_warps(thread % ROWS // 32, count, ROWS // 32)
    group += block * (ROWS // 32 // count)
    hidden_stride, sums_stride = strides
    own_ptr = target_ptr + (place + token) * hidden_stride
    own_sums_ptr = sums_ptr + (place + token) * sums_stride
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
        at = own_ptr + place_words(word + bit, lane, N_PLANES)
        tl.store(at, bits, mask=exists & (lane < 8 * N_PLANES))
        share = tl.where(bit < n_bits, whole >> shift.to(tl.int64), 0)
        tl.store(own_sums_ptr + word + bit, share, mask=exists & (lane == 0))


@triton.jit
def shrink_rows(
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
    P: tl.constexpr,
    SUMS: tl.constexpr,
    IS_PLAIN: tl.constexpr,
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
    """Write the hidden values of TURNS blocks of rows of V for the tokens of a program.

    Args:
        program: Number of the program among those of the tokens.
        place: Of the first token.
        count: Tokens, a power of two; their warps multiply the same codes at the same time.
        slot: Of their tenant.
        planes_ptr: int64 [places, planes_stride], the bits of tokens; ZERO_WORDS before are 0.
        planes_stride: Same.
        step_ptr: fp32 [places], what a unit of each token is worth.
        norm_ptr: fp32 [places], the length of each token.
        sums_ptr: int64 [places, n_inputs], what each token sums up to.
        n_inputs: Same.
        hidden_ptr: int32 [places, hidden_stride], the bits of hidden values.
        hidden_stride: Same.
        hidden_sums_ptr: int64, what each word of them sums up to.
        table_ptr: int64, addresses of slabs.
        entry_ptr: Directory entry of the tenant at the site.
        P: Of `finish_record`, and so all that follow.
        SUMS: Of `load_sums`.
        IS_PLAIN: Same.
        R: Same.
        WK: Same.
        WR: Same.
        U: Same.
        X_AHEAD: Same.
        NARROW: Same.
        TURNS: Same.
        TOKENS: No fewer than `count`.
        USE_PTX: Same.
        OVERLAP: Wait for the launch before once the first loads are under way.
    """
    ROWS: tl.constexpr = 16 * R * WR
    THREADS: tl.constexpr = 32 * WK * WR
    # A token's rows are whole groups of 32.
    tl.static_assert(TOKENS == 1 or R == 2)  # noqa: PLR2004
    number, own = find_block(entry_ptr, program, count, ROWS * TURNS)
    if number < MAX_RECORDS:
        slab = tl.load(table_ptr + slot)
        record_ptr = entry_ptr + SHRINK_RECORDS + number * RECORD_INTS
        fields = load_record(record_ptr)
        lane, wk, first_block, token = place_threads(own * TURNS, count, R, WK, WR)
        started = ()
        if IS_PLAIN:
            started = start_record(fields, slab, first_block, wk, lane, R, U, USE_PTX)
        # Loads that only the last lines need start here, beside the codes.
        factors_ptr = load_pointer(slab, fields[5], tl.float32)
        target = load_target(record_ptr)
        width = R * (WR // count)
        n_turns = count_turns(fields, own, width, TURNS)
        at, sums_at = locate_tokens(place, count, WR, TOKENS)
        strides = (hidden_stride, hidden_stride // words_of_pair(P) * 4)
        if OVERLAP:
            gdc_wait()
        # A unit of a product, over one of a hidden value whose last copy's bits are 0.
        unit = 0.5 * tl.load(step_ptr + at) / tl.load(norm_ptr + at)
        unit = unit / load_bound(fields) * largest_number(P) / (1 << target[2] - 1)
        source_ptr = planes_ptr + (place + token) * planes_stride
        sums = load_sums(sums_ptr + sums_at * n_inputs, n_inputs, fields, SUMS)
        source = locate_source(fields, source_ptr, planes_ptr - ZERO_WORDS, lane, P)
        begun = ((), (), ())
        if IS_PLAIN:
            begun = begin_products(started, fields, source, wk, P, U, X_AHEAD)
            if TURNS > 1:
                sums = count_read(sums, fields[0])
        for turn in range(n_turns if TURNS > 1 else 1):
            block = own * TURNS + turn
            row = row_of_share(block, count, R, WR)
            factor = tl.load(factors_ptr + row, mask=row < fields[2], other=0.0)
            if IS_PLAIN:
                products, begun = finish_turn(
                    begun, turn, n_turns, fields, sums, slab, first_block, width, source, wk,
                    lane, R, P, WK, WR, U, X_AHEAD, NARROW, TURNS > 1, USE_PTX,
                )  # fmt: skip
            else:
                products = finish_record(
                    fields, sums, slab, first_block, source_ptr, planes_ptr - ZERO_WORDS, wk,
                    lane, R, P, WK, WR, U, X_AHEAD, NARROW, USE_PTX,
                )  # fmt: skip
            h = round_to_int(products * factor * unit) << target[2] - 1
            store_hidden(
                order_shares(h, R, WR), target, hidden_ptr, hidden_sums_ptr, strides, place,
                block, count, fields[2], lane, P, ROWS, THREADS, USE_PTX,
            )  # fmt: skip


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
    count_ptr,
    number_ptr,
    P: tl.constexpr,
    SUMS: tl.constexpr,
    IS_PLAIN: tl.constexpr,
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
    """TURNS blocks of rows of V for up to TOKENS tokens of a tenant: hidden = bits of V x."""
    if OVERLAP:
        gdc_launch_dependents()
    place = tl.program_id(0 if TOKENS_FIRST else 1).to(tl.int64)
    program = tl.program_id(1 if TOKENS_FIRST else 0)
    slot = tl.load(slot_ptr + place)
    if slot >= 0:
        entry_ptr = directory_ptr + slot.to(tl.int64) * slot_stride + site_offset
        count, number = load_group(count_ptr + place, number_ptr + place, TOKENS)
        shrink_rows(
            program * count + number, place - number, count, slot, planes_ptr, planes_stride,
            step_ptr, norm_ptr, sums_ptr, n_inputs, hidden_ptr, hidden_stride, hidden_sums_ptr,
            table_ptr, entry_ptr, P, SUMS, IS_PLAIN, R, WK, WR, U, X_AHEAD, NARROW, TURNS, TOKENS,
            USE_PTX, OVERLAP,
        )  # fmt: skip
    # Programs without work wait too: who waits for this launch means the ones before it as well.
    if OVERLAP:
        gdc_wait()
