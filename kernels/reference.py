"""The ops in plain torch: the truth for every kernel, and what runs on a CPU."""

from collections.abc import Iterator

import torch
from torch.nn import functional

from deltacome_core.packed import (
    PackedBand,
    PackedDirect,
    PackedFactor,
    PackedLinear,
    PackedMatrix,
)


def _with_ranks(matrix: PackedMatrix) -> Iterator[tuple[slice, PackedBand]]:
    first = 0
    for band in matrix.bands:
        yield slice(first, first + band.rank), band
        first += band.rank


def dequantise(factor: PackedFactor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Values of a packed factor, (code - zero) * scale; exact.

    Args:
        factor: The packed factor, [rows, cols].
        out: fp32 [rows, cols], overwritten; made where it is None.

    Returns:
        fp32 [rows, cols].
    """
    values = factor.dequantise()
    return values if out is None else out.copy_(values)


def shrink(
    x: torch.Tensor, matrix: PackedMatrix, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Activations in the basis of the right singular vectors, h = diag(sigma) V x, per token.

    Delta-CoMe (arXiv 2406.08903), section 3: the delta is U diag(sigma) V, a band a bit width.

    Args:
        x: bf16, fp16 or fp32 [tokens, in].
        matrix: The packed delta on x's device.
        out: fp32 [tokens, rank], overwritten; made where it is None.

    Returns:
        fp32 [tokens, rank], within 2e-6 of the exact product (relative L2).
    """
    if out is None:
        out = torch.empty(x.shape[0], matrix.rank, device=x.device)
    x = x.float()
    for ranks, band in _with_ranks(matrix):
        out[:, ranks] = (x @ band.v.dequantise().T) * matrix.sigma[ranks]
    return out


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
        out: [tokens, out], overwritten, may be `y`; made where it is None.

    Returns:
        [tokens, out] in y's dtype, fp32 without y: the exact sum within 2e-6 (relative L2), rounded
        once.
    """
    total = torch.zeros(h.shape[0], matrix.out_features, device=h.device)
    for ranks, band in _with_ranks(matrix):
        total += h[:, ranks] @ band.u.dequantise().T
    if y is not None:
        total += y
    if out is None:
        return total if y is None else total.to(y.dtype)
    return out.copy_(total)


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
        out: [tokens, out], overwritten, may be `y`; made where it is None.

    Returns:
        [tokens, out] in y's dtype, fp32 without y: the exact sum within 2e-6 (relative L2), rounded
        once.
    """
    total = x.float() @ matrix.dequantise().T
    if y is not None:
        total += y
    if out is None:
        return total if y is None else total.to(y.dtype)
    return out.copy_(total)


def merge(
    weight: torch.Tensor, matrix: PackedLinear, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The fine-tune's weight, backbone + U diag(sigma) V or backbone + D, summed in fp32.

    Delta-CoMe (arXiv 2406.08903), section 3: the delta is U diag(sigma) V, a band a bit width; a
    direct matrix D stands for itself.

    Args:
        weight: bf16, fp16 or fp32 [out, in].
        matrix: The packed delta on the weight's device.
        out: [out, in] in the weight's dtype, overwritten, may be `weight`; made where it is None.

    Returns:
        [out, in] in the weight's dtype: the exact sum within 2e-6 (relative L2), rounded once.
    """
    total = matrix.dequantise() + weight
    return total.to(weight.dtype) if out is None else out.copy_(total)


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
        [tokens, out] in x's dtype: the exact sum within 2e-6 (relative L2), rounded once.
    """
    base = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if isinstance(matrix, PackedDirect):
        return multiply(x, matrix, base, out=base).to(x.dtype)
    return expand(shrink(x, matrix), matrix, base, out=base).to(x.dtype)
