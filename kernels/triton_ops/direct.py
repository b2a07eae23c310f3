import torch
import triton
import triton.language as tl

from deltacome_core.layout import TILE_CODES
from deltacome_core.packed import PackedDirect
from kernels.config import choose_blocks
from kernels.triton_ops.launch import factor_arguments, unit_columns
from kernels.triton_ops.planes import SPAN, TILE, load_values, multiply_rows


@triton.jit
def multiply_kernel(
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
    """One block of out [n_tokens, n_rows] = base + x [n_tokens, n_cols] D^T [n_cols, n_rows]."""
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
            values = load_values(
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
            partial += multiply_rows(x, values, BLOCK_T)
        total += partial
    mask = (token < n_tokens)[:, None] & (row < n_rows)[None, :]
    token = token.to(tl.int64)
    if HAS_BASE:
        base_at = base_ptr + token[:, None] * base_stride + row[None, :]
        total += tl.load(base_at, mask=mask, other=0.0).to(tl.float32)
    out_at = out_ptr + token[:, None] * out_stride + row[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def merge_direct_kernel(
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
    BLOCK_N: tl.constexpr,
) -> None:
    """One block of rows of one packed tile: out [n_rows, n_cols] = base + values."""
    tile = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]  # [N, 1]
    col = tile * TILE + tl.arange(0, TILE)[None, :]  # [1, K]
    values = load_values(
        codes_ptr,
        scale_ptr,
        zero_ptr,
        row,
        col,
        tile,
        n_rows,
        n_cols,
        row_words,
        group_rows,
        group_cols,
        row_groups,
        BITS,
        HAS_ZERO,
    )
    mask = (row < n_rows) & (col < n_cols)
    row = row.to(tl.int64)
    base = tl.load(base_ptr + row * base_stride + col, mask=mask, other=0.0)
    total = base.to(tl.float32) + values
    tl.store(out_ptr + row * out_stride + col, total.to(out_ptr.dtype.element_ty), mask=mask)


def multiply(
    x: torch.Tensor,
    matrix: PackedDirect,
    y: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Outputs of a direct matrix, y + x D^T, summed in fp32.

    Args:
        x: bf16, fp16 or fp32 [tokens, in].
        matrix: The packed delta D on x's device.
        y: bf16, fp16 or fp32 [tokens, out] to add to; None is zero.
        out: [tokens, out] with adjacent columns, overwritten, may be `y`; made where it is None.

    Returns:
        [tokens, out] in y's dtype, fp32 without y: the exact sum within 2e-6 (relative L2), rounded
        once.
    """
    x = unit_columns(x)
    n_tokens = x.shape[0]
    if out is None:
        dtype = torch.float32 if y is None else y.dtype
        out = torch.empty(n_tokens, matrix.out_features, dtype=dtype, device=x.device)
    if n_tokens == 0:
        return out
    base = out if y is None else unit_columns(y)
    factor = matrix.factor
    blocks = choose_blocks("multiply", bits=factor.bits, n_tokens=n_tokens)
    grid = (triton.cdiv(factor.rows, blocks.rows), triton.cdiv(n_tokens, blocks.tokens))
    multiply_kernel[grid](
        x,
        x.stride(0),
        n_tokens,
        *factor_arguments(factor),
        base,
        base.stride(0),
        out,
        out.stride(0),
        BITS=factor.bits,
        HAS_ZERO=factor.zero is not None,
        HAS_BASE=y is not None,
        BLOCK_T=blocks.tokens,
        BLOCK_N=blocks.rows,
        BLOCK_K=blocks.reduction,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    return out


def merge_direct(
    weight: torch.Tensor, matrix: PackedDirect, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The fine-tune's weight, backbone + D, summed in fp32.

    Args:
        weight: bf16, fp16 or fp32 [out, in].
        matrix: The packed delta D on the weight's device.
        out: [out, in] in the weight's dtype with adjacent columns, overwritten, may be `weight`;
            made where it is None.

    Returns:
        [out, in] in the weight's dtype: the sum rounded to fp32, then to the dtype.
    """
    if out is None:
        out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    base = unit_columns(weight)
    factor = matrix.factor
    blocks = choose_blocks("merge_direct", bits=factor.bits)
    grid = (triton.cdiv(factor.rows, blocks.rows), triton.cdiv(factor.cols, TILE_CODES))
    merge_direct_kernel[grid](
        *factor_arguments(factor),
        base,
        base.stride(0),
        out,
        out.stride(0),
        BITS=factor.bits,
        HAS_ZERO=factor.zero is not None,
        BLOCK_N=blocks.rows,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    return out
