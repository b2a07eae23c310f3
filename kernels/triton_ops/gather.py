"""Rows of embeddings of many tenants, added to those of the backbone."""

import triton
import triton.language as tl

from kernels.triton_ops.planes import TILE, load_values

TENSORS = tl.constexpr(5)


@triton.jit
def load_basis(basis_ptr, rank, col, n_cols, mask) -> tl.tensor:
    """Values of a bf16 basis [ranks, n_cols] in fp32: they are its upper half."""
    at = basis_ptr + rank.to(tl.int64) * n_cols + col
    bits = tl.load(at, mask=mask, other=0).to(tl.int32) << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["y_stride", "n_cols", "width", "row_words", "row_groups"])
def gather_kernel(
    ids_ptr,
    slots_ptr,
    table_ptr,
    y_ptr,
    y_stride,
    n_cols,
    width,
    row_words,
    group_cols,
    row_groups,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BASIS: tl.constexpr,
) -> None:
    """One tile of one token: y [n_cols] += the delta of its embedding row.

    A row has `width` codes: its values, or with a basis its coordinates.
    """
    token = tl.program_id(1)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        tensors_ptr = table_ptr + slot.to(tl.int64) * TENSORS
        places_ptr = tl.load(tensors_ptr).to(tl.pointer_type(tl.int32))
        row = tl.load(places_ptr + tl.load(ids_ptr + token))
        if row >= 0:
            codes_ptr = tl.load(tensors_ptr + 1).to(tl.pointer_type(tl.int32))
            scale_ptr = tl.load(tensors_ptr + 2).to(tl.pointer_type(tl.float16))
            zero_ptr = tl.load(tensors_ptr + 3).to(tl.pointer_type(tl.uint8))
            tile = tl.program_id(0)
            within = tl.arange(0, TILE)
            col = tile * TILE + within
            if HAS_BASIS:
                basis_ptr = tl.load(tensors_ptr + 4).to(tl.pointer_type(tl.int16))
                values = tl.zeros((TILE,), dtype=tl.float32)
                for first in range(0, width, TILE):
                    rank = first + within
                    coordinates = load_values(
                        codes_ptr, scale_ptr, zero_ptr, row, rank, first // TILE, row + 1, width,
                        row_words, 1, group_cols, row_groups, BITS, HAS_ZERO,
                    )  # fmt: skip
                    mask = (rank < width)[:, None] & (col < n_cols)[None, :]
                    basis = load_basis(basis_ptr, rank[:, None], col[None, :], n_cols, mask)
                    values += tl.sum(coordinates[:, None] * basis, axis=0)
            else:
                values = load_values(
                    codes_ptr, scale_ptr, zero_ptr, row, col, tile, row + 1, n_cols,
                    row_words, 1, group_cols, row_groups, BITS, HAS_ZERO,
                )  # fmt: skip
            at = y_ptr + token.to(tl.int64) * y_stride + col
            y = tl.load(at, mask=col < n_cols, other=0.0).to(tl.float32) + values
            tl.store(at, y.to(y_ptr.dtype.element_ty), mask=col < n_cols)


@triton.jit(do_not_specialize=["x_stride", "n_cols", "n_ranks"])
def project_kernel(
    x_ptr,
    x_stride,
    slots_ptr,
    table_ptr,
    hidden_ptr,
    n_cols,
    n_ranks,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of ranks of one token: hidden [n_ranks] = its delta's basis times x, or 0."""
    token = tl.program_id(1)
    rank = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK), dtype=tl.float32)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        basis_ptr = tl.load(table_ptr + slot.to(tl.int64) * TENSORS + 4)
        basis_ptr = basis_ptr.to(tl.pointer_type(tl.int16))
        x_row_ptr = x_ptr + token.to(tl.int64) * x_stride
        for start in range(0, n_cols, BLOCK):
            col = start + tl.arange(0, BLOCK)
            x = tl.load(x_row_ptr + col, mask=col < n_cols, other=0.0).to(tl.float32)
            mask = (rank < n_ranks)[:, None] & (col < n_cols)[None, :]
            total += load_basis(basis_ptr, rank[:, None], col[None, :], n_cols, mask) * x[None, :]
    at = hidden_ptr + token.to(tl.int64) * n_ranks + rank
    tl.store(at, tl.sum(total, axis=1), mask=rank < n_ranks)
