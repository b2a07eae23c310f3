"""How a delta is compressed: recipes and their presets."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from deltacome_core.errors import UserError
from deltacome_core.layout import Group

MIN_MATRIX_BITS = 0.05
MAX_MATRIX_BITS = 8.0

DEFAULT_RECIPE = "hub"
Method = Literal["lowrank", "direct", "lossless"]
# What shares a scale where a matrix is kept as its signs.
ScalePer = Literal["matrix", "row"]
# How rank bands are chosen: the published list, one band of 8 bits, or fitted to the spectrum.
Bands = Literal["published", "single", "spectrum"]
# What shares a scale in U and V: groups of a vector on an asymmetric grid, or a whole vector on a
# grid around zero.
Grid = Literal["group", "vector"]
# One bit cannot say that a weight of a changed row stayed as it was.
_EMBEDDING_BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A named way to compress.

    `matrix_bits` is bits per parameter of the matrices alone: of low-rank ones all their bytes are
    counted; where signs are kept it is 1, beside the scales, and no other size can be asked for.
    `dropped_loss` is what losing a direction costs, in units of the same energy as noise, where
    bands are fitted to the spectrum. `headroom` widens the grid of V beyond the one of least
    squared error, so that error feedback has room. Changed rows of a vocabulary take
    `embedding_bits` a code; if that is more than `vocabulary_bits` per parameter of the vocabulary,
    they become coordinates in a basis that fits, of rank `vocabulary_rank` at least. `general_text`
    calibrates on as much general text as the user brings. `distilled` trains the floats of the
    finished delta on the same texts.
    """

    name: str
    method: Method = "lowrank"
    scale_per: ScalePer = "matrix"
    bands: Bands = "published"
    grid: Grid = "group"
    dropped_loss: float = 3.0
    headroom: float = 1.0
    matrix_bits: float = 1.0
    embedding_bits: int = 4
    vocabulary_bits: float | None = None
    vocabulary_rank: int = 64
    group_size: int = 128
    damping: float = 0.01
    calibrated: bool = True
    general_text: bool = False
    distilled: bool = False

    def __post_init__(self) -> None:
        if not MIN_MATRIX_BITS <= self.matrix_bits <= MAX_MATRIX_BITS:
            reason = f"bits per parameter of matrices is {self.matrix_bits:g}, outside 0.05 to 8"
            raise UserError("recipe_invalid", reason=reason)
        if self.method == "direct" and self.matrix_bits != 1:
            raise UserError(
                "budget_fixed",
                name=self.name,
                asked=f"{self.matrix_bits:g} bits per parameter of the matrices",
            )
        if self.embedding_bits not in _EMBEDDING_BITS:
            reason = f"embedding bits is {self.embedding_bits}, not 2, 3, 4 or 8"
            raise UserError("recipe_invalid", reason=reason)
        if self.vocabulary_bits is not None and not 0 < self.vocabulary_bits <= MAX_MATRIX_BITS:
            reason = f"bits of vocabularies is {self.vocabulary_bits:g}, outside 0 to 8"
            raise UserError("recipe_invalid", reason=reason)
        if self.vocabulary_rank < 1:
            raise UserError("recipe_invalid", reason=f"rank is {self.vocabulary_rank}, below 1")
        if not (self.dropped_loss > 0 and self.headroom > 0):
            reason = f"loss {self.dropped_loss:g} and headroom {self.headroom:g} must be above 0"
            raise UserError("recipe_invalid", reason=reason)
        if self.group_size < 1:
            raise UserError("recipe_invalid", reason=f"group size is {self.group_size}, below 1")
        if self.distilled and not (self.calibrated and self.grid == "vector"):
            reason = "only what is calibrated, on grids of whole vectors, can be distilled"
            raise UserError("recipe_invalid", reason=reason)
        if not 0 < self.damping < 1:
            raise UserError("recipe_invalid", reason=f"damping is {self.damping}, outside 0 to 1")

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the name, as the manifest records it."""
        return {key: value for key, value in asdict(self).items() if key != "name"}

    @property
    def mode(self) -> str:
        """What is needed and what is lost, in a word."""
        if self.method == "lossless":
            return "lossless"
        return "calibrated" if self.calibrated else "data-free"

    @property
    def is_symmetric(self) -> bool:
        """Whether U and V have no zero points."""
        return self.grid == "vector"

    @property
    def group_u(self) -> Group:
        return (0, 1) if self.grid == "vector" else (1, self.group_size)

    @property
    def group_v(self) -> Group:
        return (1, 0) if self.grid == "vector" else (1, self.group_size)

    @property
    def group_codes(self) -> Group:
        return (1, 0) if self.scale_per == "row" else (0, 0)


_HUB = Recipe(
    name="hub",
    bands="spectrum",
    grid="vector",
    headroom=1.2,
    vocabulary_bits=0.5,
    general_text=True,
)
PRESETS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _HUB,
        replace(_HUB, name="distilled", distilled=True),
        Recipe(name="come"),
        Recipe(
            name="datafree",
            bands="spectrum",
            grid="vector",
            vocabulary_bits=0.5,
            calibrated=False,
        ),
        Recipe(
            name="lowrank", bands="single", grid="vector", vocabulary_bits=0.5, calibrated=False
        ),
        Recipe(name="bitdelta", method="direct", vocabulary_bits=0.5, calibrated=False),
        Recipe(
            name="bitdelta-row",
            method="direct",
            scale_per="row",
            vocabulary_bits=0.5,
            calibrated=False,
        ),
        Recipe(name="lossless", method="lossless", calibrated=False),
    )
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
        raise UserError("recipe_unknown", name=name, known=", ".join(sorted(PRESETS)))
    preset = PRESETS[name]
    return preset if matrix_bits is None else replace(preset, matrix_bits=matrix_bits)
