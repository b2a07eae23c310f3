"""The ops of `kernels.reference` as Triton kernels; imported only where a kernel is to run."""

import torch
from torch.nn import functional

from deltacome_core.packed import PackedDirect, PackedLinear
from kernels.triton_ops.dequantise import dequantise
from kernels.triton_ops.direct import multiply
from kernels.triton_ops.expand import expand
from kernels.triton_ops.merge import merge
from kernels.triton_ops.shrink import shrink

__all__ = ["delta_linear", "dequantise", "expand", "merge", "multiply", "shrink"]


def delta_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    matrix: PackedLinear,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer of the fine-tune, x W^T + bias + x V^T diag(sigma) U^T or + x D^T.

    Args:
        x: bf16, fp16 or fp32 [tokens, in].
        weight: [out, in] of the backbone, in x's dtype.
        matrix: The packed delta on x's device.
        bias: [out] in x's dtype, or None.

    Returns:
        [tokens, out] in x's dtype; rounded twice, after the backbone's term and after the delta's.
    """
    y = functional.linear(x, weight, bias)
    if isinstance(matrix, PackedDirect):
        return multiply(x, matrix, y, out=y)
    return expand(shrink(x, matrix), matrix, y, out=y)
