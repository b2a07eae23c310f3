import torch
import triton
import triton.language as tl

from deltacome_core.layout import TILE_CODES
from deltacome_core.packed import PackedFactor
from kernels.config import choose_blocks
from kernels.triton_ops.launch import factor_arguments
from kernels.triton_ops.planes import TILE, load_values


@triton.jit
def dequantise_kernel(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    n_rows,
    n_cols,
    row_words,
    group_rows,
    group_cols,
    row_groups,
    out_ptr,
    out_stride,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One block of rows of one packed tile: out [n_rows, n_cols] = (code - zero) * scale."""
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
    tl.store(out_ptr + row.to(tl.int64) * out_stride + col, values, mask=mask)


def dequantise(factor: PackedFactor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Values of a packed factor, (code - zero) * scale; exact.

    Args:
        factor: The packed factor on the device, [rows, cols].
        out: fp32 [rows, cols] with adjacent columns, overwritten; made where it is None.

    Returns:
        fp32 [rows, cols].
    """
    if out is None:
        out = torch.empty(factor.rows, factor.cols, device=factor.codes.device)
    if factor.rows == 0:
        return out
    blocks = choose_blocks("dequantise", bits=factor.bits)
    grid = (triton.cdiv(factor.rows, blocks.rows), triton.cdiv(factor.cols, TILE_CODES))
    dequantise_kernel[grid](
        *factor_arguments(factor),
        out,
        out.stride(0),
        BITS=factor.bits,
        HAS_ZERO=factor.zero is not None,
        BLOCK_N=blocks.rows,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    return out
