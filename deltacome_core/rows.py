"""How the rows of a vocabulary are kept, and what that costs, without torch."""

from deltacome_core.layout import Group, rows_payload
from deltacome_core.recipe import Recipe

# Width of a coordinate in a basis. One scale serves directions whose weight differs a thousandfold:
# at 4 bits the noise in the leading ones was more than all that a basis of 64 leaves out.
BASIS_BITS = 8
# Coordinates of a row share a scale up to here: rows of rare tokens are a thousand times smaller.
BASIS_GROUP: Group = (1, 128)
# Steps that kernels like.
_RANK_STEP = 16


def plain_bytes(rows: int, cols: int, n_changed: int, recipe: Recipe) -> int:
    """Count the bytes of changed rows kept as they are.

    Args:
        rows: of the backbone's tensor.
        cols: of the tensor.
        n_changed: rows that carry codes.
        recipe: gives bits and group size.

    Returns:
        Bytes of map, codes, scales and zero points, new rows not counted.
    """
    return rows_payload(
        rows,
        cols,
        n_changed=n_changed,
        bits=recipe.embedding_bits,
        group=(1, recipe.group_size),
        symmetric=False,
    ).size_bytes


def is_scaled(rows: int, n_changed: int) -> bool:
    """Whether rows in a basis are added to scaled ones of the backbone: where all of them moved.

    Args:
        rows: of the backbone's tensor.
        n_changed: rows that carry codes.

    Returns:
        True if there is a base scale.
    """
    return n_changed == rows


def basis_bytes(rows: int, cols: int, n_changed: int, rank: int) -> int:
    """Count the bytes of changed rows kept as coordinates in a basis.

    Args:
        rows: of the backbone's tensor.
        cols: of the tensor.
        n_changed: rows that carry codes.
        rank: of the basis.

    Returns:
        Bytes of map, codes, scales, basis and base scale, new rows not counted.
    """
    return rows_payload(
        rows,
        cols,
        n_changed=n_changed,
        bits=BASIS_BITS,
        group=BASIS_GROUP,
        symmetric=True,
        rank=rank,
        scaled=is_scaled(rows, n_changed),
    ).size_bytes


def choose_rank(rows: int, cols: int, n_changed: int, recipe: Recipe) -> int | None:
    """Choose how a vocabulary is kept within the recipe's budget for it.

    Args:
        rows: of the backbone's tensor.
        cols: of the tensor.
        n_changed: rows that carry codes.
        recipe: gives the budget, and the rank that is never gone below.

    Returns:
        None: rows as they are, because they fit or a basis would take more; else the largest rank
        within the budget, in steps of 16.
    """
    plain = plain_bytes(rows, cols, n_changed, recipe)
    if recipe.vocabulary_bits is None or not n_changed:
        return None
    limit = int(recipe.vocabulary_bits * rows * cols / 8)
    if plain <= limit:
        return None
    fits, over = 0, (cols - recipe.vocabulary_rank) // _RANK_STEP + 1
    while over - fits > 1:
        middle = (fits + over) // 2
        rank = recipe.vocabulary_rank + middle * _RANK_STEP
        if basis_bytes(rows, cols, n_changed, rank) <= limit:
            fits = middle
        else:
            over = middle
    rank = recipe.vocabulary_rank + fits * _RANK_STEP
    if rank > cols or basis_bytes(rows, cols, n_changed, rank) >= plain:
        return None
    return rank


def vocabulary_bytes(rows: int, cols: int, n_changed: int, recipe: Recipe) -> int:
    """Count the bytes that a vocabulary will take.

    Args:
        rows: of the backbone's tensor.
        cols: of the tensor.
        n_changed: rows that carry codes.
        recipe: how it will be packed.

    Returns:
        Bytes of its payload, new rows not counted.
    """
    rank = choose_rank(rows, cols, n_changed, recipe)
    if rank is None:
        return plain_bytes(rows, cols, n_changed, recipe)
    return basis_bytes(rows, cols, n_changed, rank)
