"""`deltacome plan`: what a delta will weigh and lose, before it is made."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltacome_core.budget import Budget, fit_recipe
from deltacome_core.checkpoint import open_checkpoint
from deltacome_core.errors import UserError
from deltacome_core.fit import check_backbone
from deltacome_core.plan import DeltaPlan, Subject, plan_delta
from deltacome_core.recipe import Recipe

if TYPE_CHECKING:
    from deltacome_core.predict import Spectrum

# What is shown where no budget was given, beside the recipe's own sizes.
_RATIOS = (8.0, 16.0, 32.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """One size: asked for as `budget` (None: the recipe's own), impossible where plan is None.

    predicted_error is ||reconstruction - delta|| / ||delta|| over the matrices.
    """

    budget: str | None
    plan: DeltaPlan | None
    smallest_bytes: int | None
    predicted_error: float | None

    def to_json(self) -> dict[str, Any]:
        sizes: dict[str, Any] = {}
        if self.plan is not None:
            sizes = {key: value for key, value in asdict(self.plan).items() if key != "recipe"} | {
                "total_bytes": self.plan.total_bytes,
                "ratio": self.plan.ratio,
                "bits_per_param": self.plan.bits_per_param,
                "matrix_bits": self.plan.recipe.matrix_bits,
                "vocabulary_bits": self.plan.recipe.vocabulary_bits,
            }
        return sizes | {
            "budget": self.budget,
            "smallest_bytes": self.smallest_bytes,
            "predicted_error": self.predicted_error,
        }

    def describe(self) -> str:
        """Say it in one line."""
        asked = self.budget or "as the recipe is"
        if self.plan is None:
            return f"{asked}: impossible, the smallest is {self.smallest_bytes:,} bytes"
        plan = self.plan
        line = (
            f"{asked}: at most {plan.total_bytes:,} bytes, {plan.ratio:.2f}x smaller, "
            f"{plan.bits_per_param:.3f} bits per parameter; matrices {plan.matrix_bytes:,}, "
            f"vocabularies {plan.vocabulary_bytes:,}, exact {plan.exact_bytes:,}, "
            f"headers {plan.header_bytes:,}"
        )
        if self.predicted_error is None:
            return line
        return f"{line}; predicted error of the changes {self.predicted_error:.3f}"


def plan_rows(
    base_dir: Path,
    tuned_dir: Path,
    recipe: Recipe,
    *,
    budget: Budget | None,
    measure: bool,
    device: str,
) -> list[PlanRow]:
    """Plan one budget, or the recipe's own sizes and three usual ratios.

    Args:
        base_dir: checkpoint folder of the backbone.
        tuned_dir: checkpoint folder of the fine-tune.
        recipe: how it would be compressed.
        budget: of the whole delta.
        measure: read the weights too: what is unchanged costs nothing, and the error is predicted.
        device: where spectra are computed.

    Returns:
        One row per size.

    Raises:
        UserError: checkpoint_quantised, backbone_mismatch, recipe_unpredictable, budget_fixed;
            with `measure` also backbone_unrelated, nan_weights.
    """
    subject, spectra = _read(base_dir, tuned_dir, measure=measure, device=device)
    if budget is not None:
        return [_plan(subject, spectra, recipe, budget)]
    rows = [_plan(subject, spectra, recipe, None)]
    if recipe.method == "lowrank":
        rows += [_plan(subject, spectra, recipe, Budget(ratio=ratio)) for ratio in _RATIOS]
    return rows


def _read(
    base_dir: Path, tuned_dir: Path, *, measure: bool, device: str
) -> "tuple[Subject, tuple[Spectrum, ...] | None]":
    base, tuned = open_checkpoint(base_dir), open_checkpoint(tuned_dir)
    check_backbone(base, tuned)
    if measure:
        from deltacome_core.delta import describe_subject, scan_checkpoint
        from deltacome_core.distance import check_related
        from deltacome_core.models import resolve_device
        from deltacome_core.predict import read_spectra

        check_related(base, tuned)
        subject = describe_subject(scan_checkpoint(base), scan_checkpoint(tuned))
        return subject, read_spectra(base, tuned, device=resolve_device(device))
    subject = Subject(
        layout=tuned.layout,
        source_bytes=tuned.size_bytes,
        backbone=base.layout,
        sidecars=[path.name for path in tuned.sidecars],
    )
    return subject, None


def _plan(
    subject: Subject,
    spectra: "tuple[Spectrum, ...] | None",
    recipe: Recipe,
    budget: Budget | None,
) -> PlanRow:
    asked = None if budget is None else budget.describe()
    try:
        fitted = recipe if budget is None else fit_recipe(subject, recipe, budget)
    except UserError as refusal:
        if refusal.code != "budget_impossible":
            raise
        smallest = int(str(refusal.params["smallest"]))
        return PlanRow(budget=asked, plan=None, smallest_bytes=smallest, predicted_error=None)
    error = None
    if spectra is not None:
        from deltacome_core.predict import predict_error

        error = predict_error(spectra, fitted)
    plan = plan_delta(subject, fitted)
    return PlanRow(budget=asked, plan=plan, smallest_bytes=None, predicted_error=error)
