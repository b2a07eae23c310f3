import torch
import triton
import triton.language as tl

from deltacome_core.packed import PackedMatrix
from kernels.config import choose_blocks
from kernels.triton_ops.launch import enumerate_bands, factor_arguments, unit_columns
from kernels.triton_ops.planes import SPAN, TILE, load_values, multiply_rows


@triton.jit
def shrink_kernel(
    x_ptr,
    x_stride,
    n_tokens,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    n_rows,
    n_cols,
    row_words,
    group_rows,
    group_cols,
    row_groups,
    sigma_ptr,
    h_ptr,
    h_stride,
    first_rank,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One band: h [n_tokens, first_rank:] = sigma * (x [n_tokens, n_cols] V^T [n_cols, n_rows])."""
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)  # [T]
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    x_row_ptr = x_ptr + token.to(tl.int64)[:, None] * x_stride
    total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for span in range(0, n_cols, SPAN):
        partial = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        for start in range(span, tl.minimum(span + SPAN, n_cols), BLOCK_K):
            col = start + tl.arange(0, BLOCK_K)  # [K]
            x_mask = (token < n_tokens)[:, None] & (col < n_cols)[None, :]
            x = tl.load(x_row_ptr + col[None, :], mask=x_mask, other=0.0).to(tl.float32)  # [T, K]
            v = load_values(
                codes_ptr,
                scale_ptr,
                zero_ptr,
                row[:, None],
                col[None, :],
                start // TILE,
                n_rows,
                n_cols,
                row_words,
                group_rows,
                group_cols,
                row_groups,
                BITS,
                HAS_ZERO,
            )  # [N, K]
            partial += multiply_rows(x, v, BLOCK_T)
        total += partial
    rank = first_rank + row
    sigma = tl.load(sigma_ptr + rank, mask=row < n_rows, other=0.0)
    h_mask = (token < n_tokens)[:, None] & (row < n_rows)[None, :]
    h_row_ptr = h_ptr + token.to(tl.int64)[:, None] * h_stride
    tl.store(h_row_ptr + rank[None, :], total * sigma[None, :], mask=h_mask)


def shrink(
    x: torch.Tensor, matrix: PackedMatrix, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Activations in the basis of the right singular vectors, h = diag(sigma) V x, per token.

    Delta-CoMe (arXiv 2406.08903), section 3: the delta is U diag(sigma) V, a band a bit width.

    Args:
        x: bf16, fp16 or fp32 [tokens, in].
        matrix: The packed delta on x's device.
        out: fp32 [tokens, rank] with adjacent columns, overwritten; made where it is None.

    Returns:
        fp32 [tokens, rank], within 2e-6 of the exact product (relative L2).
    """
    x = unit_columns(x)
    n_tokens = x.shape[0]
    if out is None:
        out = torch.empty(n_tokens, matrix.rank, device=x.device)
    if n_tokens == 0:
        return out
    for first_rank, band in enumerate_bands(matrix):
        blocks = choose_blocks("shrink", bits=band.v.bits, n_tokens=n_tokens)
        grid = (triton.cdiv(band.rank, blocks.rows), triton.cdiv(n_tokens, blocks.tokens))
        shrink_kernel[grid](
            x,
            x.stride(0),
            n_tokens,
            *factor_arguments(band.v),
            matrix.sigma,
            out,
            out.stride(0),
            first_rank,
            BITS=band.v.bits,
            HAS_ZERO=band.v.zero is not None,
            BLOCK_T=blocks.tokens,
            BLOCK_N=blocks.rows,
            BLOCK_K=blocks.reduction,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
    return out
