"""The recipe that meets a budget for the whole delta; no torch."""

from dataclasses import dataclass, replace
from math import isfinite

from deltacome_core.errors import UserError
from deltacome_core.plan import Subject, payload_bytes, plan_delta
from deltacome_core.recipe import MAX_MATRIX_BITS, MIN_MATRIX_BITS, Recipe

# Bits of a vocabulary per bit of the matrices, where a budget has to be shared out (ADR 11).
_VOCABULARY_SHARE = 0.5
_LEAST_VOCABULARY_RANK = 16
_GRID_STEPS = 64
_BISECTIONS = 30
_MILLION = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The most that a whole delta may weigh, said in one of three ways.

    ratio: size of the fine-tune's weight files over that of the delta; total_bytes: data files and
    delta.json; bits_per_param: of all parameters of the fine-tune.
    """

    ratio: float | None = None
    total_bytes: int | None = None
    bits_per_param: float | None = None

    def __post_init__(self) -> None:
        given = [
            value
            for value in (self.ratio, self.total_bytes, self.bits_per_param)
            if value is not None
        ]
        if len(given) != 1 or not (isfinite(given[0]) and given[0] > 0):
            raise UserError("budget_invalid")

    @classmethod
    def of_bits(cls, bits_per_param: float | None) -> "Budget | None":
        """Make a budget where one was asked for.

        Raises:
            UserError: budget_invalid.
        """
        return None if bits_per_param is None else cls(bits_per_param=bits_per_param)

    def describe(self) -> str:
        """Say it in words."""
        if self.ratio is not None:
            return f"a ratio of {self.ratio:g}"
        if self.total_bytes is not None:
            return f"{self.total_bytes} bytes"
        return f"{self.bits_per_param:g} bits per parameter"

    def limit_bytes(self, *, source_bytes: int, n_params: int) -> int:
        """Say it in bytes.

        Args:
            source_bytes: size of the fine-tune's weight files.
            n_params: parameters of the fine-tune.

        Returns:
            The largest size that meets it.
        """
        if self.total_bytes is not None:
            return self.total_bytes
        if self.ratio is not None:
            return int(source_bytes / self.ratio)
        return int((self.bits_per_param or 0.0) * n_params / 8)


def check_budget(recipe: Recipe, budget: Budget | None) -> None:
    """Refuse a budget for a recipe that has one size, before any file is seen.

    Raises:
        UserError: budget_fixed.
    """
    if budget is not None and recipe.method != "lowrank":
        raise UserError("budget_fixed", name=recipe.name, asked=budget.describe())


def fit_recipe(subject: Subject, recipe: Recipe, budget: Budget) -> Recipe:
    """Choose the bits of matrices and vocabularies that use a budget up.

    Vocabularies get half the bits per parameter of the matrices; what their steps leave goes to the
    matrices.

    Args:
        subject: the fine-tune.
        recipe: a low-rank one; everything but its sizes is kept.
        budget: of the whole delta.

    Returns:
        The recipe with the budget's sizes.

    Raises:
        UserError: budget_impossible, naming the smallest size; budget_fixed, the recipe has one.
    """
    check_budget(recipe, budget)
    limit = budget.limit_bytes(source_bytes=subject.source_bytes, n_params=subject.n_params)
    recipe = replace(recipe, vocabulary_rank=_LEAST_VOCABULARY_RANK)
    # Bits are whole millionths, so that delta.json is as long as that of any other choice.
    longest = replace(recipe, matrix_bits=1.000001, vocabulary_bits=1.000001)
    room = limit - plan_delta(subject, longest).header_bytes

    def weigh(bits: float, vocabulary_bits: float) -> int:
        asked = replace(recipe, matrix_bits=bits, vocabulary_bits=vocabulary_bits)
        return payload_bytes(subject, asked)

    growth = (MAX_MATRIX_BITS / MIN_MATRIX_BITS) ** (1 / _GRID_STEPS)
    grid = [MIN_MATRIX_BITS * growth**step for step in range(_GRID_STEPS)] + [MAX_MATRIX_BITS]
    sizes = [weigh(bits, bits * _VOCABULARY_SHARE) for bits in grid]
    fitting = [at for at, size in enumerate(sizes) if size <= room]
    if not fitting:
        smallest = min(sizes) + limit - room
        raise UserError(
            "budget_impossible",
            asked=limit,
            smallest=smallest,
            ratio=f"{subject.source_bytes / smallest:.2f}",
        )
    bits = grid[fitting[-1]]
    vocabulary_bits = _round_down(bits * _VOCABULARY_SHARE)
    low, high = bits, MAX_MATRIX_BITS
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if weigh(middle, vocabulary_bits) <= room:
            low = middle
        else:
            high = middle
    return replace(recipe, matrix_bits=_round_down(low), vocabulary_bits=vocabulary_bits)


def _round_down(bits: float) -> float:
    return int(bits * _MILLION) / _MILLION
