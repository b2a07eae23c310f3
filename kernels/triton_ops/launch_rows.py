"""Launches of the kernels that work on rows of vocabularies."""

import torch
import triton

from deltacome_core.layout import TILE_CODES, words_per_row
from kernels.triton_ops import gather
from kernels.triton_ops.gather import gather_kernel, project_kernel
from kernels.triton_ops.keys import settle_keys
from kernels.vocabulary import count_groups

settle_keys(gather)

# Eight ranks by 512 columns: 32 values of a basis a thread in flight.
_PROJECT_RANKS = 8
_PROJECT_COLUMNS = 512


def launch_gather(
    y: torch.Tensor,
    ids: torch.Tensor,
    slots: torch.Tensor,
    table: torch.Tensor,
    *,
    cols: int,
    width: int,
    bits: int,
    group: int,
    has_zero: bool,
    has_basis: bool,
) -> None:
    """Add the embedding deltas of tokens.

    Args:
        y: bf16, fp16 or fp32 [tokens, cols], columns adjacent.
        ids: int32 [tokens].
        slots: int32 [tokens], -1 for the backbone.
        table: int64 [slots, 5], addresses of places, codes, scales, zeros and basis.
        cols: columns of a row.
        width: codes of a row, its coordinates where there is a basis.
        bits: of its codes.
        group: codes that share a scale, 0 for all.
        has_zero: whether zero points are stored.
        has_basis: whether rows are coordinates.
    """
    row_groups = count_groups(width, group)
    gather_kernel[(triton.cdiv(cols, TILE_CODES), len(y))](
        ids,
        slots,
        table,
        y,
        y.stride(0),
        cols,
        width,
        words_per_row(width, bits),
        group or width,
        row_groups,
        BITS=bits,
        HAS_ZERO=has_zero,
        HAS_BASIS=has_basis,
        num_warps=8 if has_basis else 1,
    )


def launch_project(
    x: torch.Tensor, slots: torch.Tensor, table: torch.Tensor, hidden: torch.Tensor
) -> None:
    """Write the coordinates of tokens in the bases of their deltas.

    Args:
        x: bf16, fp16 or fp32 [tokens, cols], columns adjacent.
        slots: int32 [tokens], -1 for the backbone.
        table: of `launch_gather`.
        hidden: fp32 [tokens, ranks], overwritten.
    """
    n_tokens, n_ranks = hidden.shape
    project_kernel[(triton.cdiv(n_ranks, _PROJECT_RANKS), n_tokens)](
        x,
        x.stride(0),
        slots,
        table,
        hidden,
        x.shape[1],
        n_ranks,
        BLOCK_R=_PROJECT_RANKS,
        BLOCK=_PROJECT_COLUMNS,
        num_warps=4,
    )
