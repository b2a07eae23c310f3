"""The whole linear layer of a lone token: backbone's product and delta in one launch."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from kernels import directory
from kernels.triton_ops.batch_expand import INPUT
from kernels.triton_ops.batch_shrink import shrink_rows
from kernels.triton_ops.masks import mask_if
from kernels.triton_ops.prepare import largest_number
from kernels.triton_ops.record_products import row_of_share, sum_part
from kernels.triton_ops.records import (
    EXPAND_PARTS,
    EXPAND_RECORDS,
    EXPAND_SIZES,
    MAX_OUTPUTS,
    PART_INTS,
    RECORD_INTS,
    ZERO_WORDS,
    load_record,
    place_threads,
    start_record,
)

MAX_PARTS = tl.constexpr(directory.MAX_PARTS)
# Who has been to a block of the delta's rows: this bit is its delta, the lower ones their products.
HAS_DELTA = tl.constexpr(1 << 30)


@triton.jit
def find_part(entry_ptr, row, N_PARTS: tl.constexpr):
    """The part of a tenant's delta that has an output row.

    Args:
        entry_ptr: Directory entry of the tenant at the site.
        row: int32, the row among those of the site.
        N_PARTS: Parts an entry has room for.

    Returns:
        Number of the part, N_PARTS where the delta leaves the row alone, and the row within it.
    """
    part = tl.arange(0, N_PARTS)
    first = tl.load(entry_ptr + EXPAND_PARTS + part * PART_INTS)
    size = tl.load(entry_ptr + EXPAND_SIZES + part)
    own = (first <= row) & (row < first + size)
    number = tl.min(tl.where(own, part, N_PARTS), axis=0)
    return number, row - tl.max(tl.where(own, first, 0), axis=0)


@triton.jit
def wait_for_shrink(shrunk_ptr, n_shrink) -> None:
    """Wait until n_shrink programs before this one have written their hidden values."""
    shrunk = tl.atomic_add(shrunk_ptr, 0, sem="acquire")
    while shrunk < n_shrink:
        shrunk = tl.atomic_add(shrunk_ptr, 0, sem="acquire")
    # One thread has asked for all.
    tl.debug_barrier()


@triton.jit
def sum_delta(
    first_row,
    planes_ptr,
    step_ptr,
    norm_ptr,
    sums_ptr,
    n_inputs,
    hidden_ptr,
    hidden_sums_ptr,
    table_ptr,
    directory_ptr,
    slot_stride,
    site_offset,
    slot_ptr,
    shrunk_ptr,
    n_shrink,
    P: tl.constexpr,
    SUMS: tl.constexpr,
    IS_PLAIN: tl.constexpr,
    HAS_DIRECT: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    SHRINKS: tl.constexpr,
    R: tl.constexpr,
    WK: tl.constexpr,
    WR: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
    NARROW: tl.constexpr,
    USE_PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> tl.tensor:
    """The delta of a lone token at 16 R WR outputs, fp32 [32 WR] of `add_shares`.

    Arguments are those of `layer_kernel`. The first loads start before the hidden values have to be
    there.
    """
    ROWS: tl.constexpr = 16 * R * WR
    delta = tl.zeros((32 * WR,), dtype=tl.float32)
    slot = tl.load(slot_ptr)
    if slot >= 0:
        slab = tl.load(table_ptr + slot)
        entry_ptr = directory_ptr + slot.to(tl.int64) * slot_stride + site_offset
        number, row_in_part = find_part(entry_ptr, first_row, MAX_PARTS)
        if number < MAX_PARTS:
            part_ptr = entry_ptr + EXPAND_PARTS + number * PART_INTS
            record_ptr = entry_ptr + EXPAND_RECORDS + number * (MAX_OUTPUTS * RECORD_INTS)
            fields = load_record(record_ptr)
            block = row_in_part // ROWS
            lane, wk, first_block, _ = place_threads(block, 1, R, WK, WR)
            started = ()
            if IS_PLAIN:
                started = start_record(fields, slab, first_block, wk, lane, R, U, USE_PTX)
            n_records = tl.load(part_ptr + 2)
            source = tl.load(part_ptr + 1)
            if OVERLAP:
                gdc_wait()
            if SHRINKS > 0:
                wait_for_shrink(shrunk_ptr, n_shrink)
            source_ptr = hidden_ptr
            own_sums_ptr = hidden_sums_ptr
            n_own = 0 * n_inputs
            worth = 0.5 * tl.load(norm_ptr) / largest_number(P)
            if HAS_DIRECT:
                if source == INPUT:
                    source_ptr = planes_ptr
                    own_sums_ptr = sums_ptr
                    n_own = n_inputs
                    worth = 0.5 * tl.load(step_ptr)
            total = sum_part(
                started, fields, record_ptr, n_records, own_sums_ptr, n_own, slab, block,
                first_block, source_ptr, planes_ptr - ZERO_WORDS, wk, lane, SUMS, IS_PLAIN,
                HAS_FACTORS, R, P, WK, WR, U, X_AHEAD, NARROW, USE_PTX,
            )  # fmt: skip
            delta = total * worth
    return delta


@triton.jit
def multiply_rows(
    first_row,
    x_ptr,
    weight_ptr,
    n_cols,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """Products of rows of the backbone's weight and one token, fp32 [ROWS]."""
    rows = first_row + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    w_at = weight_ptr + rows.to(tl.int64)[:, None] * n_cols + col[None, :]
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in tl.range(0, n_cols, BLOCK, num_stages=STAGES):
        inside = start + col < n_cols
        x = tl.load(x_ptr + start + col, mask=inside, other=0.0).to(tl.float32)
        # Weights are read once: they should not push anything out of the caches.
        w = tl.load(w_at + start, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        total += w.to(tl.float32) * x[None, :]
    return tl.sum(total, axis=1)


@triton.jit(
    do_not_specialize=[
        "n_shrink",
        "n_delta",
        "n_before",
        "n_inputs",
        "n_blocks",
        "slot_stride",
        "site_offset",
    ]
)
def layer_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    n_cols,
    n_shrink,
    n_before,
    n_delta,
    planes_ptr,
    step_ptr,
    norm_ptr,
    sums_ptr,
    n_inputs,
    hidden_ptr,
    hidden_sums_ptr,
    table_ptr,
    directory_ptr,
    slot_stride,
    site_offset,
    slot_ptr,
    term_ptr,
    product_ptr,
    arrival_ptr,
    n_blocks,
    y_ptr,
    P: tl.constexpr,
    SUMS: tl.constexpr,
    IS_PLAIN: tl.constexpr,
    HAS_DIRECT: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SHRINKS: tl.constexpr,
    R: tl.constexpr,
    WK: tl.constexpr,
    WR: tl.constexpr,
    U: tl.constexpr,
    X_AHEAD: tl.constexpr,
    NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    USE_PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """One token: y = x W^T + bias + U h, or + D x; n_delta programs sum the delta.

    The first n_shrink programs do what `shrink` does, SHRINKS row blocks a warp; it is 0 where that
    was launched before. Others stream the backbone's weights, n_before of them while that and
    `prepare` still run; then come those of the delta, and only they wait, for programs that have
    started before them. Of the two programs that have a row, the second to arrive adds what the
    first has left. Parts of the site begin at multiples of the delta's blocks.
    """
    DELTA_ROWS: tl.constexpr = 16 * R * WR
    shrunk_ptr = arrival_ptr + n_blocks
    program = tl.program_id(0)
    if SHRINKS > 0:
        program -= n_shrink
        if program < 0:
            slot = tl.load(slot_ptr)
            if slot >= 0:
                entry_ptr = directory_ptr + slot.to(tl.int64) * slot_stride + site_offset
                shrink_rows(
                    program + n_shrink, 0, 1, slot, planes_ptr, 0, step_ptr, norm_ptr, sums_ptr,
                    n_inputs, hidden_ptr.to(tl.pointer_type(tl.int32)), 0, hidden_sums_ptr,
                    table_ptr, entry_ptr, P, SUMS, IS_PLAIN, SHRINKS, WK * WR, 1, U, X_AHEAD,
                    NARROW, 1, 1, USE_PTX, OVERLAP,
                )  # fmt: skip
            # Arrivals are those of this launch once the launches before have ended.
            if OVERLAP:
                gdc_wait()
            tl.debug_barrier()
            tl.atomic_add(shrunk_ptr, 1, sem="acq_rel")
    if (program >= n_before) & (program < n_before + n_delta):
        if tl.load(slot_ptr) >= 0:
            first_row = (program - n_before) * DELTA_ROWS
            delta = sum_delta(
                first_row, planes_ptr, step_ptr, norm_ptr, sums_ptr, n_inputs, hidden_ptr,
                hidden_sums_ptr, table_ptr, directory_ptr, slot_stride, site_offset,
                slot_ptr, shrunk_ptr, n_shrink, P, SUMS, IS_PLAIN, HAS_DIRECT, HAS_FACTORS,
                SHRINKS, R, WK, WR, U, X_AHEAD, NARROW, USE_PTX, OVERLAP,
            )  # fmt: skip
            # A part without a delta has waited for nothing yet.
            if OVERLAP:
                gdc_wait()
            tl.store(term_ptr + first_row + row_of_share(0, 1, R, WR), delta)
            tl.debug_barrier()
            at = arrival_ptr + program - n_before
            arrived = tl.atomic_or(at, HAS_DELTA, sem="acq_rel")
            tl.debug_barrier()
            row = tl.arange(0, DELTA_ROWS)
            mask = (arrived >> row // ROWS) & 1 != 0
            y = tl.load(product_ptr + first_row + row, mask=mask, other=0.0, cache_modifier=".cg")
            y += tl.load(term_ptr + first_row + row, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(y_ptr + first_row + row, y.to(y_ptr.dtype.element_ty), mask=mask)
    elif program >= 0:
        number = tl.where(program < n_before, program, program - n_delta)
        first_row = number * ROWS
        rows = first_row + tl.arange(0, ROWS)
        y = multiply_rows(first_row, x_ptr, weight_ptr, n_cols, ROWS, BLOCK, STAGES)
        if HAS_BIAS:
            y += tl.load(bias_ptr + rows).to(tl.float32)
        # Arrivals are those of this launch once the launches before have ended.
        if OVERLAP:
            gdc_wait()
        is_last = rows >= 0
        if tl.load(slot_ptr) >= 0:
            tl.store(product_ptr + rows, y)
            tl.debug_barrier()
            block: tl.constexpr = DELTA_ROWS // ROWS
            arrived = tl.atomic_or(
                arrival_ptr + number // block, 1 << number % block, sem="acq_rel"
            )
            tl.debug_barrier()
            is_last = mask_if(is_last, arrived >= HAS_DELTA)
            y += tl.load(term_ptr + rows, mask=is_last, other=0.0, cache_modifier=".cg")
        tl.store(y_ptr + rows, y.to(y_ptr.dtype.element_ty), mask=is_last)
