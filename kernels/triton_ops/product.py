"""A product of unfolded factors added to the backbone's weight, which is read once."""

import torch
import triton
import triton.language as tl

# Tiles of the product: rows, columns, reduction, warps, stages; what fits from Hopper on, and else.
_LARGE_TILE = (128, 256, 64, 8, 3)
_SMALL_TILE = (128, 128, 32, 8, 3)
_HOPPER = 90
# Tiles of rows that are worked on together, so that columns are found in the cache.
_BAND = 8


@triton.jit
def product_kernel(
    left_ptr,
    left_stride,
    right_ptr,
    right_stride,
    base_ptr,
    base_stride,
    out_ptr,
    out_stride,
    n_rows,
    n_cols,
    n_inner,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """One tile of out [n_rows, n_cols] = base + scale left [n_rows, n_inner] right."""
    tiles_n = tl.cdiv(n_cols, BLOCK_N)
    band = tl.program_id(0) // (BAND * tiles_n)
    within = tl.program_id(0) % (BAND * tiles_n)
    height = tl.minimum(tl.cdiv(n_rows, BLOCK_M) - band * BAND, BAND)
    row = (band * BAND + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    left_at = left_ptr + row.to(tl.int64)[:, None] * left_stride + inner[None, :]
    right_at = right_ptr + inner.to(tl.int64)[:, None] * right_stride + col[None, :]
    is_row = (row < n_rows)[:, None]
    is_col = (col < n_cols)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in tl.range(0, n_inner, BLOCK_K, num_stages=STAGES):
        exists = start + inner < n_inner
        left = tl.load(left_at, mask=is_row & exists[None, :], other=0.0)
        right = tl.load(right_at, mask=exists[:, None] & is_col, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        left_at += BLOCK_K
        right_at += BLOCK_K * right_stride
    row = row.to(tl.int64)
    base_at = base_ptr + row[:, None] * base_stride + col[None, :]
    total = total * scale + tl.load(base_at, mask=is_row & is_col, other=0.0).to(tl.float32)
    out_at = out_ptr + row[:, None] * out_stride + col[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=is_row & is_col)


def add_product(
    base: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    scale: float,
    arch: int,
    out: torch.Tensor,
) -> None:
    """Write base + scale left @ right, summed in fp32 and rounded once.

    torch.addmm copies base into out first: a third of the bytes of a merge (docs/benchmarks).

    Args:
        base: bf16, fp16 or fp32 [m, n], columns adjacent like those of all others.
        left: [m, k] in the same dtype.
        right: [k, n] in the same dtype.
        scale: of the product.
        arch: compute capability, 90 for Hopper.
        out: [m, n], overwritten; not one of the others.
    """
    is_large = arch >= _HOPPER and base.element_size() == 2  # noqa: PLR2004 bytes
    rows, columns, inner, warps, stages = _LARGE_TILE if is_large else _SMALL_TILE
    m, n = base.shape
    product_kernel[(triton.cdiv(m, rows) * triton.cdiv(n, columns),)](
        left,
        left.stride(0),
        right,
        right.stride(0),
        base,
        base.stride(0),
        out,
        out.stride(0),
        m,
        n,
        left.shape[1],
        scale,
        BLOCK_M=rows,
        BLOCK_N=columns,
        BLOCK_K=inner,
        BAND=_BAND,
        STAGES=stages,
        num_warps=warps,
    )
