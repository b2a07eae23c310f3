"""Grouped asymmetric quantisation of factor matrices."""

from dataclasses import dataclass

import torch

# Shrink factors tried by the clip search. Measured on Gaussian rows in groups of 128: the optimum
# lies near .62 at 2 bits and .80 at 3 bits, and a finer step changes the error by less than 0.1 %.
_CLIP_STEPS = tuple(1.0 - 0.03 * step for step in range(20))

# A vector that lost more than half its length on each side is noise and is not amplified further.
_SMALLEST_GAIN = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedFactor:
    """Codes and grid of one factor; value = (code - zero) * scale, groups along the columns.

    codes uint8 [rows, cols]; scale float16 [rows, groups]; zero uint8 [rows, groups] or None for
    the symmetric grid whose zero is (2^bits - 1) / 2.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    group_size: int
    max_code: torch.Tensor

    def dequantise(self) -> torch.Tensor:
        """Return the values float32 [rows, cols] that a reader of the packed bytes will see."""
        cols = self.codes.shape[1]
        scale = _spread(self.scale.float(), self.group_size, cols)
        if self.zero is None:
            return (self.codes.float() - self.max_code[:, None] / 2) * scale
        return (self.codes.float() - _spread(self.zero.float(), self.group_size, cols)) * scale


def _spread(per_group: torch.Tensor, group_size: int, cols: int) -> torch.Tensor:
    return per_group.repeat_interleave(group_size, dim=1)[:, :cols]


def largest_codes(bits: int, rows: int, device: torch.device) -> torch.Tensor:
    """Return float32 [rows] filled with the largest code of a bit width."""
    return torch.full((rows,), float(2**bits - 1), device=device)


def fit_grid(values: torch.Tensor, max_code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit the min-max asymmetric grid of one group; the range always includes zero.

    The scale is rounded to float16, as stored, before the zero is chosen.

    Args:
        values: float32 [rows, n].
        max_code: float32 [rows], 2^bits - 1.

    Returns:
        scale float32 [rows] (exactly representable in float16), zero float32 [rows] (integers).

    Source: GPTQ (arXiv 2210.17323) reference quantiser, asymmetric min-max.
    """
    low = values.amin(dim=1).clamp_max(0.0)
    high = values.amax(dim=1).clamp_min(0.0)
    return _grid_of_range(low, high, max_code)


def _grid_of_range(
    low: torch.Tensor, high: torch.Tensor, max_code: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = ((high - low) / max_code).half().float()
    zero = torch.round(-low * invert_scale(scale))
    return scale, zero.clamp_min(0.0).minimum(max_code)


def search_grid(values: torch.Tensor, max_code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit the asymmetric grid whose clipped range has the least squared error.

    Args:
        values: float32 [rows, n].
        max_code: float32 [rows], 2^bits - 1.

    Returns:
        scale float32 [rows] (exactly representable in float16), zero float32 [rows] (integers).
    """
    low = values.amin(dim=1).clamp_max(0.0)
    high = values.amax(dim=1).clamp_min(0.0)
    best_scale, best_zero = _grid_of_range(low, high, max_code)
    best_error = _squared_error(values, best_scale, best_zero, max_code)
    for shrink in _CLIP_STEPS[1:]:
        scale, zero = _grid_of_range(low * shrink, high * shrink, max_code)
        error = _squared_error(values, scale, zero, max_code)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _squared_error(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, max_code: torch.Tensor
) -> torch.Tensor:
    inverse = invert_scale(scale)
    codes = encode(values, inverse[:, None], zero[:, None], max_code=max_code[:, None])
    return ((codes - zero[:, None]) * scale[:, None] - values).square().sum(dim=1)


def invert_scale(scale: torch.Tensor) -> torch.Tensor:
    """Return 1 / scale, and 0 for a zero scale so that its group encodes to the zero code.

    Args:
        scale: float32, any shape, not negative.

    Returns:
        float32 of scale's shape.
    """
    return torch.where(scale > 0, 1.0 / torch.where(scale > 0, scale, 1.0), 0.0)


def encode(
    values: torch.Tensor, inverse_scale: torch.Tensor, zero: torch.Tensor, *, max_code: torch.Tensor
) -> torch.Tensor:
    """Return the nearest codes, clamped to the grid.

    Args:
        values: float32, any shape.
        inverse_scale: float32 from invert_scale, broadcastable to values.
        zero: float32, broadcastable to values.
        max_code: float32, broadcastable to values.

    Returns:
        float32 of values' shape, whole numbers in 0..max_code.
    """
    return (torch.round(values * inverse_scale) + zero).clamp_min(0.0).minimum(max_code)


def round_to_nearest(
    values: torch.Tensor, max_code: torch.Tensor, *, group_size: int, clip_search: bool
) -> QuantisedFactor:
    """Quantise each group on its own grid, without error feedback.

    Args:
        values: float32 [rows, cols].
        max_code: float32 [rows], 2^bits - 1 of each row.
        group_size: columns that share a scale.
        clip_search: choose the clip of least squared error rather than the full range.

    Returns:
        The codes with one scale and zero per row and group.
    """
    fit = search_grid if clip_search else fit_grid
    codes, scales, zeros = [], [], []
    for group in torch.split(values, group_size, dim=1):
        scale, zero = fit(group, max_code)
        inverse = invert_scale(scale)
        codes.append(encode(group, inverse[:, None], zero[:, None], max_code=max_code[:, None]))
        scales.append(scale)
        zeros.append(zero)
    return QuantisedFactor(
        codes=torch.cat(codes, dim=1).to(torch.uint8),
        scale=torch.stack(scales, dim=1).half(),
        zero=torch.stack(zeros, dim=1).to(torch.uint8),
        group_size=group_size,
        max_code=max_code,
    )


def unbias_sigma(
    sigma: torch.Tensor,
    *,
    left: torch.Tensor,
    right: torch.Tensor,
    rounded_left: torch.Tensor,
    rounded_right: torch.Tensor,
    hessian: torch.Tensor | None = None,
) -> torch.Tensor:
    """Undo the shrinking of quantisers: each direction keeps its full strength.

    A grid of least squared error pulls vectors towards zero (u . u_hat < 1), so the fine-tune's
    change would be weakened everywhere at once, and errors of one sign in every matrix add up where
    random ones cancel. Dividing by both gains makes u^T (u_hat sigma v_hat) v = sigma again, at the
    price of a larger weight error. docs/recipes.md has the measurements.

    Args:
        sigma: float32 [rank].
        left: float32 [out, rank], unit columns.
        right: float32 [rank, in], unit rows.
        rounded_left: float32 [out, rank], dequantised U.
        rounded_right: float32 [rank, in], dequantised V.
        hessian: float32 [in, in]; the strength of V is then measured on the inputs it describes.

    Returns:
        float32 [rank], not negative.
    """
    read = right if hessian is None else right @ hessian
    strength = (read * right).sum(dim=1)
    kept = (read * rounded_right).sum(dim=1) / strength.clamp_min(torch.finfo(torch.float32).tiny)
    # A direction that no input excites has no strength to keep.
    kept = torch.where(strength > 0, kept, 1.0)
    gain = (left * rounded_left).sum(dim=0) * kept
    return sigma / gain.clamp_min(_SMALLEST_GAIN)
