"""A resident factor as numbers: for matrix products of many tokens, and for merging."""

import torch
import triton
import triton.language as tl

from kernels.triton_ops.mma import load_pair, unpack_step
from kernels.triton_ops.records import load_pointer

# Programs that walk over a factor, a few for each processor of a large device.
_PROGRAMS = 1024


@triton.jit(do_not_specialize=["n_cols", "out_stride"])
def unfold_kernel(
    record_ptr,
    table_ptr,
    slot,
    out_ptr,
    n_cols,
    out_stride,
    BITS: tl.constexpr,
    IS_GROUPED: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    WARPS: tl.constexpr,
) -> None:
    """Write out [rows, n_cols] = 2 (code - zero), times the row's factor and the tile's scale."""
    slab = tl.load(table_ptr + slot)
    codes_ptr = load_pointer(slab, tl.load(record_ptr + 1), tl.int32)
    high_ptr = load_pointer(slab, tl.load(record_ptr + 2), tl.int32)
    n_rows = tl.load(record_ptr + 3)
    n_blocks = tl.load(record_ptr + 4)
    n_steps = tl.load(record_ptr + 5)
    factors = tl.load(record_ptr + 6)
    factors_ptr = load_pointer(slab, factors, tl.float32)
    group_ptr = load_pointer(slab, tl.load(record_ptr + 7), tl.int32)
    n_pairs = (n_steps + 1) // 2
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    first = tl.program_id(0) * WARPS
    for start in range(first, n_blocks * n_pairs, tl.num_programs(0) * WARPS):
        item = start + thread // 32
        mask = item < n_blocks * n_pairs
        block = item // n_pairs
        pair = item % n_pairs
        words = load_pair(codes_ptr, high_ptr, block, pair, n_steps, lane, mask, BITS)
        for half in tl.static_range(2):
            row = block * 16 + lane // 4 + 8 * half
            inside = mask & (row < n_rows)
            factor = tl.load(factors_ptr + row, mask=inside & (factors > 0), other=1.0)
            twice_zero = tl.zeros_like(lane) + ((1 << BITS) - 1)
            if IS_GROUPED:
                at = group_ptr + pair // 2 * (n_blocks * 16) + row
                word = tl.load(at, mask=inside, other=0)
                twice_zero = (word >> 16) & 511
                factor *= word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            row_at = out_ptr + row.to(tl.int64) * out_stride
            for step in tl.static_range(2):
                codes = unpack_step(words, step, BITS)
                for side in tl.static_range(2):
                    col = (2 * pair + step) * 32 + lane % 4 * 8 + 4 * side
                    four = tl.zeros_like(lane).to(tl.int64)
                    for byte in tl.static_range(4):
                        code = (codes[half + 2 * side] >> (8 * byte)) & 0xFF
                        value = (2 * code - twice_zero).to(tl.float32) * factor
                        value = value.to(out_ptr.dtype.element_ty)
                        if IS_ALIGNED:
                            bits = value.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
                            four |= bits << (16 * byte)
                        else:
                            tl.store(
                                row_at + col + byte, value, mask=inside & (col + byte < n_cols)
                            )
                    if IS_ALIGNED:
                        at = (row_at + col).to(tl.pointer_type(tl.int64))
                        tl.store(at, four, mask=inside & (col < n_cols))


def unfold(
    record: torch.Tensor,
    table: torch.Tensor,
    slot: int,
    out: torch.Tensor,
    *,
    bits: int,
    is_grouped: bool,
) -> None:
    """Write twice the values of a resident factor.

    Args:
        record: int32 [16], its record on the device.
        table: int64 [slots], addresses of the slabs.
        slot: whose it is.
        out: [rows, columns] of the factor, columns adjacent, overwritten.
        bits: of its codes.
        is_grouped: whether it has a scale a tile.
    """
    # Four values of 16 bits become one store.
    aligned = out.element_size() == 2 and not (  # noqa: PLR2004 bytes
        out.shape[1] % 4 or out.stride(0) % 4 or out.data_ptr() % 8
    )
    unfold_kernel[(_PROGRAMS,)](
        record,
        table,
        slot,
        out,
        out.shape[1],
        out.stride(0),
        BITS=bits,
        IS_GROUPED=is_grouped,
        IS_ALIGNED=aligned,
        WARPS=4,
        num_warps=4,
    )
