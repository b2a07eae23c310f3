"""How the changed matrices of a fine-tune are packed, by the method of the recipe."""

from collections.abc import Sequence

import torch

from deltacome_core.factorise import FactorisedMatrix, NamedDelta, factorise_matrices
from deltacome_core.recipe import Recipe, plan_bands
from deltacome_core.signs import quantise_signs


def is_quantised(shape: tuple[int, int], recipe: Recipe) -> bool:
    """Tell whether a matrix is worth its codes; if not it is cheaper to keep it exactly.

    Args:
        shape: (out, in).
        recipe: how it would be packed.

    Returns:
        True unless no rank band fits.
    """
    return recipe.method == "direct" or bool(plan_bands(*shape, recipe))


def quantise_matrices(
    deltas: Sequence[NamedDelta], recipe: Recipe, *, hessian: torch.Tensor | None
) -> tuple[FactorisedMatrix, ...]:
    """Pack the deltas of matrices that read the same input.

    Args:
        deltas: float32 [out, in] each, one `in` for all, on the device that does the work.
        recipe: how to pack them.
        hessian: float32 [in, in], mean of x x^T; signs need none.

    Returns:
        One packed matrix per delta, in order.
    """
    if recipe.method == "direct":
        return quantise_signs(deltas, recipe)
    return factorise_matrices(deltas, recipe, hessian=hessian)
