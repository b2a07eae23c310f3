import torch
import triton
import triton.language as tl

from deltacome_core.packed import PackedMatrix
from kernels.config import choose_blocks
from kernels.triton_ops.launch import enumerate_bands, factor_arguments, running_sums, unit_columns
from kernels.triton_ops.planes import TILE, load_values, multiply_rows


@triton.jit
def expand_kernel(
    h_ptr,
    h_stride,
    n_tokens,
    first_rank,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    n_rows,
    n_cols,
    row_words,
    group_rows,
    group_cols,
    row_groups,
    base_ptr,
    base_stride,
    out_ptr,
    out_stride,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BASE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One band: out [n_tokens, n_rows] = base + h [n_tokens, first_rank:] U^T [n_cols, n_rows]."""
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)  # [T]
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    h_row_ptr = h_ptr + token.to(tl.int64)[:, None] * h_stride + first_rank
    total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for start in range(0, n_cols, BLOCK_K):
        col = start + tl.arange(0, BLOCK_K)  # [K]
        h_mask = (token < n_tokens)[:, None] & (col < n_cols)[None, :]
        h = tl.load(h_row_ptr + col[None, :], mask=h_mask, other=0.0)  # [T, K]
        u = load_values(
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
        total += multiply_rows(h, u, BLOCK_T)
    mask = (token < n_tokens)[:, None] & (row < n_rows)[None, :]
    token = token.to(tl.int64)
    if HAS_BASE:
        base_at = base_ptr + token[:, None] * base_stride + row[None, :]
        total += tl.load(base_at, mask=mask, other=0.0).to(tl.float32)
    out_at = out_ptr + token[:, None] * out_stride + row[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=mask)


def expand(
    h: torch.Tensor,
    matrix: PackedMatrix,
    y: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Outputs from the left singular vectors, y + U h, summed in fp32 over all bands.

    Delta-CoMe (arXiv 2406.08903), section 3: the delta is U diag(sigma) V, a band a bit width.

    Args:
        h: fp32 [tokens, rank] of `shrink`, sigma already applied.
        matrix: The packed delta on h's device.
        y: bf16, fp16 or fp32 [tokens, out] to add to; None is zero.
        out: [tokens, out] with adjacent columns, overwritten, may be `y`; made where it is None.

    Returns:
        [tokens, out] in y's dtype, fp32 without y: the exact sum within 2e-6 (relative L2), rounded
        once.
    """
    h = unit_columns(h)
    n_tokens = h.shape[0]
    if out is None:
        dtype = torch.float32 if y is None else y.dtype
        out = torch.empty(n_tokens, matrix.out_features, dtype=dtype, device=h.device)
    if n_tokens == 0:
        return out
    base = None if y is None else unit_columns(y)
    totals = running_sums(out, n_bands=len(matrix.bands))
    for (first_rank, band), total in zip(enumerate_bands(matrix), totals, strict=True):
        blocks = choose_blocks("expand", bits=band.u.bits, n_tokens=n_tokens)
        grid = (triton.cdiv(band.u.rows, blocks.rows), triton.cdiv(n_tokens, blocks.tokens))
        expand_kernel[grid](
            h,
            h.stride(0),
            n_tokens,
            first_rank,
            *factor_arguments(band.u),
            total if base is None else base,
            total.stride(0) if base is None else base.stride(0),
            total,
            total.stride(0),
            BITS=band.u.bits,
            HAS_ZERO=band.u.zero is not None,
            HAS_BASE=base is not None,
            BLOCK_T=blocks.tokens,
            BLOCK_N=blocks.rows,
            BLOCK_K=blocks.reduction,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
        base = total
    return out
