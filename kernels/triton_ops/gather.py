"""Rows of embeddings of many tenants, added to those of the backbone."""

import triton
import triton.language as tl

from kernels.triton_ops.planes import TILE, load_values


@triton.jit(do_not_specialize=["y_stride", "n_cols", "row_words", "group_cols", "row_groups"])
def gather_kernel(
    ids_ptr,
    slots_ptr,
    table_ptr,
    y_ptr,
    y_stride,
    n_cols,
    row_words,
    group_cols,
    row_groups,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
) -> None:
    """One tile of one token: y [n_cols] += the delta of its embedding row."""
    token = tl.program_id(1)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        tensors_ptr = table_ptr + slot.to(tl.int64) * 4
        places_ptr = tl.load(tensors_ptr).to(tl.pointer_type(tl.int32))
        row = tl.load(places_ptr + tl.load(ids_ptr + token))
        if row >= 0:
            tile = tl.program_id(0)
            col = tile * TILE + tl.arange(0, TILE)
            values = load_values(
                tl.load(tensors_ptr + 1).to(tl.pointer_type(tl.int32)),
                tl.load(tensors_ptr + 2).to(tl.pointer_type(tl.float16)),
                tl.load(tensors_ptr + 3).to(tl.pointer_type(tl.uint8)),
                row,
                col,
                tile,
                row + 1,
                n_cols,
                row_words,
                1,
                group_cols,
                row_groups,
                BITS,
                HAS_ZERO,
            )
            at = y_ptr + token.to(tl.int64) * y_stride + col
            y = tl.load(at, mask=col < n_cols, other=0.0).to(tl.float32) + values
            tl.store(at, y.to(y_ptr.dtype.element_ty), mask=col < n_cols)
