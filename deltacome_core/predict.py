"""What a budget will lose, from the spectra of the changes, before anything is quantised."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltacome_core.bands import plan_bands, unbiased_noise
from deltacome_core.checkpoint import Checkpoint
from deltacome_core.delta import TensorKind, load_pair
from deltacome_core.errors import UserError
from deltacome_core.recipe import Recipe
from deltacome_core.svd import singular_energies


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectrum:
    """Squared singular values of one changed matrix, falling; of a stack their mean."""

    name: str
    shape: tuple[int, int]
    energies: tuple[float, ...]
    n_slices: int


def read_spectra(
    base: Checkpoint, tuned: Checkpoint, *, device: torch.device
) -> tuple[Spectrum, ...]:
    """Decompose every changed matrix without its vectors.

    Args:
        base: the backbone.
        tuned: a fine-tune of it.
        device: where to decompose.

    Returns:
        One spectrum per matrix that rank bands would be made of.
    """
    found = []
    for name in sorted(tuned.tensors):
        pair = load_pair(base, tuned, name)
        if pair.kind is not TensorKind.LOWRANK:
            continue
        slices = pair.difference().to(device)
        rows, cols = slices.shape[-2:]
        slices = slices.reshape(-1, rows, cols)
        energies = torch.stack([singular_energies(each) for each in slices]).mean(dim=0)
        found.append(
            Spectrum(
                name=name,
                shape=(rows, cols),
                energies=tuple(energies.tolist()),
                n_slices=len(slices),
            )
        )
    return tuple(found)


def predict_error(spectra: Sequence[Spectrum], recipe: Recipe) -> float:
    """Predict what a recipe will leave of the changes of all matrices.

    Each kept direction gets the noise of its width, each dropped one is lost. Error feedback moves
    noise to where inputs do not see it, so that calibrated deltas have more of it.

    Args:
        spectra: of the changed matrices.
        recipe: one whose vectors have a scale each.

    Returns:
        ||reconstruction - delta|| / ||delta|| over all matrices.

    Raises:
        UserError: recipe_unpredictable.
    """
    if recipe.method != "lowrank" or recipe.grid != "vector":
        raise UserError("recipe_unpredictable", name=recipe.name)
    lost = total = 0.0
    for spectrum in spectra:
        energies = spectrum.energies
        bands = plan_bands(*spectrum.shape, recipe, energies=energies)
        start = 0
        for band in bands:
            kept = sum(energies[start : start + band.rank])
            lost += spectrum.n_slices * unbiased_noise(band.bits) * kept
            start += band.rank
        lost += spectrum.n_slices * sum(energies[start:])
        total += spectrum.n_slices * sum(energies)
    return float((lost / total) ** 0.5) if total else 0.0
