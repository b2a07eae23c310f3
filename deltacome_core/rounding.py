"""The values of a matrix that is served with fewer bits, with the same bits on every device."""

import torch
from torch.nn import functional

from deltacome_core.precision import Scheme


def round_values(values: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Round a tensor to what a server with fewer bits computes with.

    Only operations on single elements, minima and maxima occur, so no order of a sum can show.

    Args:
        values: float tensor; its last dimension is cut into groups, the last one may be shorter.
        scheme: grid and groups.

    Returns:
        code * scale or (code - zero) * scale, in the shape and dtype of values, on its device.

    Source: docs/format.md, "Backbones served with fewer bits".
    """
    width = values.shape[-1]
    group = scheme.group or width
    # Padding is 0, which every grid holds: it moves neither a minimum nor a maximum.
    padded = functional.pad(values.to(torch.float32), (0, -width % group))
    wide = padded.reshape(*padded.shape[:-1], -1, group)
    grid = _symmetric if scheme.symmetric else _asymmetric
    rounded = grid(wide, values.dtype, scheme)
    return rounded.flatten(-2, -1)[..., :width].to(values.dtype)


def _symmetric(wide: torch.Tensor, dtype: torch.dtype, scheme: Scheme) -> torch.Tensor:
    top = (1 << (scheme.bits - 1)) - 1
    scale = (wide.abs().amax(dim=-1, keepdim=True) / top).to(dtype).to(torch.float32)
    codes = (wide / _divisor(scale)).round().clamp(-top, top)
    return codes * scale


def _asymmetric(wide: torch.Tensor, dtype: torch.dtype, scheme: Scheme) -> torch.Tensor:
    top = (1 << scheme.bits) - 1
    low = wide.amin(dim=-1, keepdim=True).clamp(max=0)
    high = wide.amax(dim=-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / top).to(dtype).to(torch.float32)
    zero = (-low / _divisor(scale)).round().clamp(0, top)
    codes = ((wide / _divisor(scale)).round() + zero).clamp(0, top)
    return (codes - zero) * scale


def _divisor(scale: torch.Tensor) -> torch.Tensor:
    """A scale of 0 stands for a group of zeros, or of numbers too small for the dtype."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
