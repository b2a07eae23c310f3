import torch
import triton
import triton.language as tl

from deltacome_core.packed import PackedDirect, PackedLinear
from kernels.config import choose_blocks
from kernels.triton_ops.direct import merge_direct
from kernels.triton_ops.launch import enumerate_bands, factor_arguments, running_sums, unit_columns
from kernels.triton_ops.planes import TILE, load_values


@triton.jit
def merge_kernel(
    u_codes_ptr,
    u_scale_ptr,
    u_zero_ptr,
    n_rows,
    rank,
    u_row_words,
    u_group_rows,
    u_group_cols,
    u_row_groups,
    v_codes_ptr,
    v_scale_ptr,
    v_zero_ptr,
    v_rows,
    n_cols,
    v_row_words,
    v_group_rows,
    v_group_cols,
    v_row_groups,
    sigma_ptr,
    first_rank,
    base_ptr,
    base_stride,
    out_ptr,
    out_stride,
    BITS: tl.constexpr,
    U_HAS_ZERO: tl.constexpr,
    V_HAS_ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One band: out [n_rows, n_cols] = base + U [n_rows, rank] diag(sigma) V [rank, n_cols]."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    first_col = tl.program_id(1) * BLOCK_N
    col = first_col + tl.arange(0, BLOCK_N)  # [N]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, rank, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)  # [K]
        u = load_values(
            u_codes_ptr,
            u_scale_ptr,
            u_zero_ptr,
            row[:, None],
            inner[None, :],
            start // TILE,
            n_rows,
            rank,
            u_row_words,
            u_group_rows,
            u_group_cols,
            u_row_groups,
            BITS,
            U_HAS_ZERO,
        )  # [M, K]
        v = load_values(
            v_codes_ptr,
            v_scale_ptr,
            v_zero_ptr,
            inner[:, None],
            col[None, :],
            first_col // TILE,
            v_rows,
            n_cols,
            v_row_words,
            v_group_rows,
            v_group_cols,
            v_row_groups,
            BITS,
            V_HAS_ZERO,
        )  # [K, N]
        sigma = tl.load(sigma_ptr + first_rank + inner, mask=inner < rank, other=0.0)
        total += tl.dot(u, v * sigma[:, None], input_precision="ieee")
    mask = (row < n_rows)[:, None] & (col < n_cols)[None, :]
    row = row.to(tl.int64)
    base = tl.load(base_ptr + row[:, None] * base_stride + col[None, :], mask=mask, other=0.0)
    total += base.to(tl.float32)
    out_at = out_ptr + row[:, None] * out_stride + col[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=mask)


def merge(
    weight: torch.Tensor, matrix: PackedLinear, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The fine-tune's weight, backbone + U diag(sigma) V or backbone + D, summed in fp32.

    Delta-CoMe (arXiv 2406.08903), section 3: the delta is U diag(sigma) V, a band a bit width; a
    direct matrix D stands for itself.

    Args:
        weight: bf16, fp16 or fp32 [out, in].
        matrix: The packed delta on the weight's device.
        out: [out, in] in the weight's dtype with adjacent columns, overwritten, may be `weight`;
            made where it is None.

    Returns:
        [out, in] in the weight's dtype: the exact sum within 2e-6 (relative L2), rounded once.
    """
    if isinstance(matrix, PackedDirect):
        return merge_direct(weight, matrix, out=out)
    if out is None:
        out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    base = unit_columns(weight)
    totals = running_sums(out, n_bands=len(matrix.bands))
    for (first_rank, band), total in zip(enumerate_bands(matrix), totals, strict=True):
        blocks = choose_blocks("merge", bits=band.bits)
        grid = (
            triton.cdiv(matrix.out_features, blocks.rows),
            triton.cdiv(matrix.in_features, blocks.columns),
        )
        merge_kernel[grid](
            *factor_arguments(band.u),
            *factor_arguments(band.v),
            matrix.sigma,
            first_rank,
            base,
            base.stride(0),
            total,
            total.stride(0),
            BITS=band.bits,
            U_HAS_ZERO=band.u.zero is not None,
            V_HAS_ZERO=band.v.zero is not None,
            BLOCK_M=blocks.rows,
            BLOCK_N=blocks.columns,
            BLOCK_K=blocks.reduction,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
        base = total
    return out
