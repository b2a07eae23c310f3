"""Public ops on packed deltas: Triton for CUDA tensors, `kernels.reference` for all others.

Triton is imported by the first CUDA tensor, so that a CPU process never pays for it.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from deltacome_core.errors import InternalError
from deltacome_core.packed import PackedDirect, PackedFactor, PackedLinear, PackedMatrix
from kernels import reference

__all__ = ["delta_linear", "dequantise", "expand", "merge", "multiply", "shrink"]

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Backend(Protocol):
    """What `kernels.reference` and `kernels.triton_ops` both are."""

    def dequantise(
        self, factor: PackedFactor, *, out: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    def shrink(
        self, x: torch.Tensor, matrix: PackedMatrix, *, out: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    def expand(
        self,
        h: torch.Tensor,
        matrix: PackedMatrix,
        y: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    def multiply(
        self,
        x: torch.Tensor,
        matrix: PackedDirect,
        y: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    def merge(
        self, weight: torch.Tensor, matrix: PackedLinear, *, out: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    def delta_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        matrix: PackedLinear,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


def _choose_backend(device: torch.device) -> Backend:
    if device.type != "cuda":
        return reference
    from kernels import triton_ops

    return triton_ops


def _activate(device: torch.device) -> AbstractContextManager[object]:
    # Triton launches on the current device, wherever its tensors are.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _check(
    name: str,
    tensor: torch.Tensor | None,
    shape: tuple[int, ...],
    *,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = ACTIVATION_DTYPES,
) -> None:
    # A kernel trusts its sizes: a wrong one would read or write outside the tensor.
    if tensor is None:
        return
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != device:
        found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise InternalError(f"{name} is {found}, expected {shape} on {device}")


def _check_matrix(matrix: PackedLinear, device: torch.device) -> None:
    if isinstance(matrix, PackedMatrix) and not matrix.bands:
        raise InternalError(f"{matrix.name} has no rank band")
    first = matrix.factor.codes if isinstance(matrix, PackedDirect) else matrix.sigma
    if first.device != device:
        raise InternalError(f"{matrix.name} is on {first.device}, expected {device}")


def _check_out(out: torch.Tensor | None, like: torch.Tensor, shape: tuple[int, int]) -> None:
    _check("out", out, shape, device=like.device, dtypes=(like.dtype,))
    if out is not None and out.stride(1) != 1:
        raise InternalError(f"columns of out lie {out.stride(1)} elements apart, expected adjacent")


def dequantise(factor: PackedFactor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Values of a packed factor, (code - zero) * scale; exact.

    Args:
        factor: The packed factor, [rows, cols].
        out: fp32 [rows, cols] with adjacent columns, overwritten; made where it is None.

    Returns:
        fp32 [rows, cols].

    Raises:
        InternalError: `out` does not fit.
    """
    device = factor.codes.device
    _check_out(out, torch.empty(0, device=device), (factor.rows, factor.cols))
    with _activate(device):
        return _choose_backend(device).dequantise(factor, out=out)


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

    Raises:
        InternalError: A shape, dtype or device does not fit.
    """
    n_tokens = len(x)
    _check_matrix(matrix, x.device)
    _check("x", x, (n_tokens, matrix.in_features), device=x.device)
    _check_out(out, matrix.sigma, (n_tokens, matrix.rank))
    with _activate(x.device):
        return _choose_backend(x.device).shrink(x, matrix, out=out)


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

    Raises:
        InternalError: A shape, dtype or device does not fit.
    """
    n_tokens = len(h)
    shape = (n_tokens, matrix.out_features)
    _check_matrix(matrix, h.device)
    _check("h", h, (n_tokens, matrix.rank), device=h.device, dtypes=(torch.float32,))
    _check("y", y, shape, device=h.device)
    _check_out(out, h if y is None else y, shape)
    with _activate(h.device):
        return _choose_backend(h.device).expand(h, matrix, y, out=out)


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

    Raises:
        InternalError: A shape, dtype or device does not fit.
    """
    n_tokens = len(x)
    shape = (n_tokens, matrix.out_features)
    _check_matrix(matrix, x.device)
    _check("x", x, (n_tokens, matrix.in_features), device=x.device)
    _check("y", y, shape, device=x.device)
    _check_out(out, matrix.factor.scale.float() if y is None else y, shape)
    with _activate(x.device):
        return _choose_backend(x.device).multiply(x, matrix, y, out=out)


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

    Raises:
        InternalError: A shape, dtype or device does not fit.
    """
    shape = (matrix.out_features, matrix.in_features)
    _check_matrix(matrix, weight.device)
    _check("weight", weight, shape, device=weight.device)
    _check_out(out, weight, shape)
    with _activate(weight.device):
        return _choose_backend(weight.device).merge(weight, matrix, out=out)


def delta_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    matrix: PackedLinear,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer of the fine-tune, x W^T + bias + x V^T diag(sigma) U^T or + x D^T.

    Args:
        x: bf16, fp16 or fp32 [..., in].
        weight: [out, in] of the backbone, in x's dtype.
        matrix: The packed delta on x's device.
        bias: [out] in x's dtype, or None.

    Returns:
        [..., out] in x's dtype: the exact sum, rounded at most twice.

    Raises:
        InternalError: A shape, dtype or device does not fit.
    """
    device, dtypes = x.device, (x.dtype,)
    rows = x.reshape(-1, x.shape[-1])
    _check_matrix(matrix, device)
    _check("x", rows, (len(rows), matrix.in_features), device=device)
    shape = (matrix.out_features, matrix.in_features)
    _check("weight", weight, shape, device=device, dtypes=dtypes)
    _check("bias", bias, (matrix.out_features,), device=device, dtypes=dtypes)
    with _activate(device):
        y = _choose_backend(device).delta_linear(rows, weight, matrix, bias)
    return y.reshape(*x.shape[:-1], matrix.out_features)
