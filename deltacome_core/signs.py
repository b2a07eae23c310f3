"""The delta of a matrix as its signs and their mean size: BitDelta without its distillation."""

from collections.abc import Sequence

import torch

from deltacome_core.bitpack import pack_codes
from deltacome_core.factorise import FactorisedMatrix, NamedDelta
from deltacome_core.packed import PackedDirect, PackedFactor
from deltacome_core.recipe import Recipe

_LARGEST_SCALE = torch.finfo(torch.float16).max


def quantise_signs(deltas: Sequence[NamedDelta], recipe: Recipe) -> tuple[FactorisedMatrix, ...]:
    """Keep one bit per weight, and the scale of least squared error per matrix or per row.

    A weight that did not change counts as one that grew, in every run.

    Args:
        deltas: float32 [out, in] each, on the device that does the work.
        recipe: says what shares a scale.

    Returns:
        One packed matrix per delta, in order: symmetric codes whose value is plus or minus half
        the scale, which is twice the mean magnitude.

    Source: BitDelta (arXiv 2402.10193), section 3.1, whose second stage then distils the scales on
        text; a scale per row as in arXiv 2512.19720, which distils too.
    """
    return tuple(_quantise(source, recipe) for source in deltas)


def _quantise(source: NamedDelta, recipe: Recipe) -> FactorisedMatrix:
    delta = source.delta
    by_row = recipe.scale_per == "row"
    rows = delta if by_row else delta.reshape(1, -1)
    # Summed in f64: f32 sums depend on the number of threads.
    mean = rows.abs().mean(dim=1, keepdim=True, dtype=torch.float64)
    scale = (2 * mean).clamp_max(_LARGEST_SCALE).half()
    codes = (delta >= 0).to(torch.uint8)
    error = torch.linalg.vector_norm((codes.float() - 0.5) * scale.float() - delta)
    size = torch.linalg.vector_norm(delta).clamp_min(1e-30)
    factor = PackedFactor(
        codes=pack_codes(codes, 1).cpu(),
        scale=scale.cpu(),
        zero=None,
        bits=1,
        rows=delta.shape[0],
        cols=delta.shape[1],
        group=recipe.group_codes,
    )
    packed = PackedDirect(name=source.name, factor=factor)
    return FactorisedMatrix(packed=packed, relative_error=float(error / size))
