"""What a delta of a backbone will weigh, from shapes alone, before anything is sent."""

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from deltacome_core.bands import limit_bytes, matrix_size_bytes, plan_bands
from deltacome_core.checkpoint import Layout, is_vocabulary_tensor
from deltacome_core.entries import is_lowrank_shape
from deltacome_core.layout import direct_payload, rows_payload
from deltacome_core.recipe import Recipe
from deltacome_core.safetensors_file import ITEM_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """`matrix_bytes` is exact, or the budget where bands follow the spectrum.

    `rows_bytes` and `exact_bytes` hold if all of it changed.
    """

    n_matrices: int
    matrix_bytes: int
    rows_bytes: int
    exact_bytes: int
    source_size_bytes: int

    @property
    def size_bytes(self) -> int:
        return self.matrix_bytes + self.rows_bytes + self.exact_bytes


@lru_cache(maxsize=512)
def _matrix_bytes(out_features: int, in_features: int, recipe: Recipe) -> int:
    if recipe.method == "direct":
        return direct_payload(
            out_features, in_features, bits=1, group=recipe.group_codes, symmetric=True
        ).size_bytes
    if recipe.bands == "spectrum":
        return limit_bytes(out_features, in_features, recipe)
    return matrix_size_bytes(
        out_features,
        in_features,
        plan_bands(out_features, in_features, recipe),
        group_u=recipe.group_u,
        group_v=recipe.group_v,
        has_zero=not recipe.is_symmetric,
    )


def estimate_delta(layout: Layout, recipe: Recipe) -> Estimate:
    """Add up the packed size of every tensor of a fine-tune that has the backbone's shapes.

    What the lossless recipe leaves of a tensor depends on its numbers: whole tensors are counted.

    Raises:
        UserError: budget_impossible.
    """
    matrices = matrix_bytes = rows_bytes = exact_bytes = source_bytes = 0
    for name, (dtype, shape) in layout.items():
        tensor_bytes = prod(shape) * ITEM_BYTES[dtype]
        source_bytes += tensor_bytes
        if recipe.method == "lossless":
            exact_bytes += tensor_bytes
        elif len(shape) == 2 and is_vocabulary_tensor(name):  # noqa: PLR2004  a matrix
            rows_bytes += rows_payload(
                *shape,
                n_changed=shape[0],
                bits=recipe.embedding_bits,
                group=(1, recipe.group_size),
                symmetric=False,
            ).size_bytes
        elif is_lowrank_shape(name, shape):
            n_slices = prod(shape[:-2])
            matrices += n_slices
            matrix_bytes += n_slices * _matrix_bytes(*shape[-2:], recipe)
        else:
            exact_bytes += tensor_bytes
    return Estimate(
        n_matrices=matrices,
        matrix_bytes=matrix_bytes,
        rows_bytes=rows_bytes,
        exact_bytes=exact_bytes,
        source_size_bytes=source_bytes,
    )
