"""How a delta is compressed: presets, and the exact bytes a choice of rank bands costs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from deltacome_core.errors import UserError
from deltacome_core.layout import Group, RankBand, matrix_payload

__all__ = ["PRESETS", "RankBand", "Recipe", "get_recipe", "matrix_size_bytes", "plan_bands"]

# The published setting is 2 @ 8 bit + 32 @ 3 bit + the rest @ 2 bit for 4096 x 4096, whose rank
# at 1 bit per parameter and 1 bit per code would be 2048 (thunlp/Delta-CoMe, run.sh).
_PUBLISHED_SPAN = 2048
_PUBLISHED_RANK_8BIT = 2
_PUBLISHED_RANK_3BIT = 32
MIN_MATRIX_BITS = 0.05
MAX_MATRIX_BITS = 8.0

Method = Literal["lowrank", "direct", "lossless"]
# What shares a scale where a matrix is kept as its signs.
ScalePer = Literal["matrix", "row"]
# One bit cannot say that a weight of a changed row stayed as it was.
_EMBEDDING_BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A named way to compress.

    `matrix_bits` is bits per parameter of the matrices alone: of low-rank ones all their bytes are
    counted; where signs are kept it is 1, beside the scales, and no other size can be asked for.
    """

    name: str
    method: Method = "lowrank"
    scale_per: ScalePer = "matrix"
    matrix_bits: float = 1.0
    embedding_bits: int = 4
    group_size: int = 128
    damping: float = 0.01
    calibrated: bool = True

    def __post_init__(self) -> None:
        if not MIN_MATRIX_BITS <= self.matrix_bits <= MAX_MATRIX_BITS:
            reason = f"bits per parameter of matrices is {self.matrix_bits:g}, outside 0.05 to 8"
            raise UserError("recipe_invalid", reason=reason)
        if self.method == "direct" and self.matrix_bits != 1:
            raise UserError("budget_fixed", name=self.name, asked=f"{self.matrix_bits:g}")
        if self.embedding_bits not in _EMBEDDING_BITS:
            reason = f"embedding bits is {self.embedding_bits}, not 2, 3, 4 or 8"
            raise UserError("recipe_invalid", reason=reason)
        if self.group_size < 1:
            raise UserError("recipe_invalid", reason=f"group size is {self.group_size}, below 1")
        if not 0 < self.damping < 1:
            raise UserError("recipe_invalid", reason=f"damping is {self.damping}, outside 0 to 1")

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the name, as the manifest records it."""
        return {key: value for key, value in asdict(self).items() if key != "name"}

    @property
    def group_u(self) -> Group:
        return (1, self.group_size)

    @property
    def group_v(self) -> Group:
        return (1, self.group_size)

    @property
    def group_codes(self) -> Group:
        return (1, 0) if self.scale_per == "row" else (0, 0)


PRESETS: dict[str, Recipe] = {
    "come": Recipe(name="come"),
    "datafree": Recipe(name="datafree", calibrated=False),
    "bitdelta": Recipe(name="bitdelta", method="direct", calibrated=False),
    "bitdelta-row": Recipe(name="bitdelta-row", method="direct", scale_per="row", calibrated=False),
    "lossless": Recipe(name="lossless", method="lossless", calibrated=False),
}


def get_recipe(name: str, *, matrix_bits: float | None = None) -> Recipe:
    """Look a recipe up by name.

    Args:
        name: a key of PRESETS.
        matrix_bits: bits per parameter of the matrices to use instead of the preset's.

    Returns:
        The recipe.

    Raises:
        UserError: recipe_unknown, recipe_invalid, budget_fixed.
    """
    if name not in PRESETS:
        raise UserError("recipe_unknown", name=name, known=sorted(PRESETS))
    preset = PRESETS[name]
    return preset if matrix_bits is None else replace(preset, matrix_bits=matrix_bits)


def matrix_size_bytes(
    out_features: int,
    in_features: int,
    bands: Sequence[RankBand],
    *,
    group_u: Group,
    group_v: Group,
    has_zero: bool,
) -> int:
    """Count the bytes of a packed matrix as stored.

    Args:
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        bands: rank bands.
        group_u: scale group of U [out, rank].
        group_v: scale group of V [rank, in].
        has_zero: whether zero points are stored.

    Returns:
        Bytes of sigma, codes, scales and zeros, alignment padding included.
    """
    return matrix_payload(
        out_features,
        in_features,
        bands=bands,
        group_u=group_u,
        group_v=group_v,
        symmetric=not has_zero,
    ).size_bytes


def _clamp(value: float, low: int, high: int) -> int:
    return max(low, min(high, round(value)))


def _leading_bands(out_features: int, in_features: int, budget: float) -> list[list[RankBand]]:
    span = budget * out_features * in_features / (out_features + in_features) / _PUBLISHED_SPAN
    rank_8bit = _clamp(_PUBLISHED_RANK_8BIT * span, 1, _PUBLISHED_RANK_8BIT)
    rank_3bit = _clamp(_PUBLISHED_RANK_3BIT * span, 1, _PUBLISHED_RANK_3BIT)
    # Small matrices cannot pay the metadata of three bands; the costly bands go first.
    return [
        [RankBand(8, rank_8bit), RankBand(3, rank_3bit)],
        [RankBand(3, rank_3bit)],
        [],
    ]


def plan_bands(out_features: int, in_features: int, recipe: Recipe) -> tuple[RankBand, ...]:
    """Choose the rank bands of a matrix within the recipe's budget.

    Args:
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        recipe: gives the budget and the group size.

    Returns:
        Bands by falling bits, all-in size at most matrix_bits * out * in / 8 bytes. The 2-bit band
        takes every rank that still fits; a matrix too small for three bands gets fewer, and one
        too small for a single rank gets none: it is cheaper to keep it exactly.

    Source: Delta-CoMe (arXiv 2406.08903), 8+3+2 bit setting, scaled by m*n/(m+n).
    """
    limit_bytes = recipe.matrix_bits * out_features * in_features / 8
    max_rank = min(out_features, in_features)

    def size_bytes(bands: list[RankBand]) -> int:
        return matrix_size_bytes(
            out_features,
            in_features,
            bands,
            group_u=recipe.group_u,
            group_v=recipe.group_v,
            has_zero=True,
        )

    for leading in _leading_bands(out_features, in_features, recipe.matrix_bits):
        fits, over = 0, max_rank - sum(band.rank for band in leading) + 1
        while over - fits > 1:
            middle = (fits + over) // 2
            if size_bytes([*leading, RankBand(2, middle)]) <= limit_bytes:
                fits = middle
            else:
                over = middle
        if fits:
            return (*leading, RankBand(2, fits))
    return ()
