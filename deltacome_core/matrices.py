"""How the changed matrices of a fine-tune are packed, by the method of the recipe."""

from collections.abc import Mapping, Sequence

import torch

from deltacome_core.bands import Allowance, largest_rank, plan_bands
from deltacome_core.factorise import FactorisedMatrix, NamedDelta, factorise_matrices
from deltacome_core.layout import RankBand
from deltacome_core.recipe import Recipe
from deltacome_core.signs import quantise_signs
from deltacome_core.svd import singular_energies
from deltacome_core.walk import Walks


def is_quantised(shape: tuple[int, int], recipe: Recipe) -> bool:
    """Tell whether a matrix is worth its codes; if not it is cheaper to keep it exactly.

    Args:
        shape: (out, in).
        recipe: how it would be packed.

    Returns:
        True unless no rank band fits.
    """
    return recipe.method == "direct" or largest_rank(*shape, recipe) > 0


def plan_stack(slices: Sequence[torch.Tensor], recipe: Recipe) -> tuple[RankBand, ...] | None:
    """Choose one set of bands for all slices of a stack, where it matters from their mean spectrum.

    Args:
        slices: float32 [out, in] each, on the device that does the work.
        recipe: how they will be packed.

    Returns:
        The bands; None where matrices have none.
    """
    if recipe.method != "lowrank":
        return None
    shape = slices[0].shape[0], slices[0].shape[1]
    if recipe.bands != "spectrum":
        return plan_bands(*shape, recipe)
    energies = torch.stack([singular_energies(each) for each in slices]).mean(dim=0)
    return plan_bands(*shape, recipe, energies=energies.tolist())


def quantise_matrices(
    deltas: Sequence[NamedDelta],
    recipe: Recipe,
    *,
    hessian: torch.Tensor | None,
    bands: Mapping[str, tuple[RankBand, ...]] | None = None,
    allowance: Allowance | None = None,
    walks: Walks | None = None,
) -> tuple[FactorisedMatrix, ...]:
    """Pack the deltas of matrices that read the same input.

    Args:
        deltas: float32 [out, in] each, one `in` for all, on the device that does the work.
        recipe: how to pack them.
        hessian: float32 [in, in], mean of x x^T; signs need none.
        bands: of matrices whose bands were chosen before, by name.
        allowance: bytes that other matrices of the part left of their limits.
        walks: of other matrices, to be used again.

    Returns:
        One packed matrix per delta, in order.
    """
    if recipe.method == "direct":
        return quantise_signs(deltas, recipe)
    return factorise_matrices(
        deltas, recipe, hessian=hessian, bands=bands, allowance=allowance, walks=walks
    )
