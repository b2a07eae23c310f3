"""Which singular vectors are kept at how many bits, and the exact bytes that costs."""

import operator
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

from deltacome_core.layout import Group, RankBand, matrix_payload
from deltacome_core.recipe import Recipe

# The published setting is 2 @ 8 bit + 32 @ 3 bit + the rest @ 2 bit for 4096 x 4096, whose rank
# at 1 bit per parameter and 1 bit per code would be 2048 (thunlp/Delta-CoMe, run.sh).
_PUBLISHED_SPAN = 2048
_PUBLISHED_RANK_8BIT = 2
_PUBLISHED_RANK_3BIT = 32
_LOWRANK_BITS = 8
_SPECTRUM_BITS = (1, 2, 3, 4, 8)

# Squared error of a unit Gaussian on the best uniform grid of 2^b levels around zero (Max 1960,
# table II; 8 bits: spacing .0308, numerically).
_GRID_ERROR = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 8: 0.0001}
_BISECTIONS = 64
# A full word of 2-bit codes. In a matrix this large a band gives up less than 1 % of its rank for
# it; smaller ones keep every vector they can pay.
_RANK_STEP = 16
_LARGE_SIDE = 1024


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


def limit_bytes(out_features: int, in_features: int, recipe: Recipe) -> int:
    """Say what the recipe lets a low-rank matrix weigh at most, all overhead counted."""
    return int(recipe.matrix_bits * out_features * in_features / 8)


class Allowance:
    """Bytes that the matrices of a part left of their limits, which come in whole vectors.

    The next matrix of the part may have them: so the part meets its budget though no matrix does.
    """

    def __init__(self) -> None:
        self.spare_bytes = 0

    def settle(
        self, out_features: int, in_features: int, recipe: Recipe, bands: Sequence[RankBand]
    ) -> None:
        """Count in what a matrix took of its limit and of the spare bytes.

        Args:
            out_features: rows of the matrix.
            in_features: columns of the matrix.
            recipe: gave the limit.
            bands: what was chosen with the spare bytes.
        """
        self.spare_bytes += limit_bytes(out_features, in_features, recipe)
        self.spare_bytes -= _size(out_features, in_features, recipe, bands)


def largest_rank(
    out_features: int, in_features: int, recipe: Recipe, *, spare_bytes: int = 0
) -> int:
    """Bound the rank that any choice of bands can have within the recipe's budget.

    Args:
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        recipe: gives the budget.
        spare_bytes: what may be used beyond it.

    Returns:
        The rank of one band at the fewest bits of the recipe; 0 where not even one vector fits.
    """
    bits = {"published": 2, "single": _LOWRANK_BITS, "spectrum": min(_SPECTRUM_BITS)}[recipe.bands]
    limit = limit_bytes(out_features, in_features, recipe) + spare_bytes
    return _widest(out_features, in_features, recipe, [], bits, limit=limit)


def plan_bands(
    out_features: int,
    in_features: int,
    recipe: Recipe,
    *,
    energies: Sequence[float] | None = None,
    spare_bytes: int = 0,
) -> tuple[RankBand, ...]:
    """Choose the rank bands of a matrix within the recipe's budget.

    Args:
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        recipe: gives the budget and how bands are chosen.
        energies: squared singular values, falling, at least largest_rank of them or all there are;
            needed where the recipe fits its bands to the spectrum.
        spare_bytes: what may be used beyond the budget.

    Returns:
        Bands by falling bits, all-in size at most limit_bytes and spare_bytes. A matrix too small
        for a single vector gets none: it is cheaper to keep it exactly.

    Source: "published": Delta-CoMe (arXiv 2406.08903), 8+3+2 bit setting, scaled by m*n/(m+n).
        "spectrum": reverse water-filling with what quantisation leaves as the price.
    """
    if recipe.bands == "spectrum":
        return _plan_spectrum(out_features, in_features, recipe, energies or (), spare_bytes)
    if recipe.bands == "single":
        rank = largest_rank(out_features, in_features, recipe, spare_bytes=spare_bytes)
        return (RankBand(_LOWRANK_BITS, rank),) if rank else ()
    for leading in _leading_bands(out_features, in_features, recipe.matrix_bits):
        limit = limit_bytes(out_features, in_features, recipe) + spare_bytes
        rank = _widest(out_features, in_features, recipe, leading, 2, limit=limit)
        if rank:
            return (*leading, RankBand(2, rank))
    return ()


def _size(m: int, n: int, recipe: Recipe, bands: Sequence[RankBand]) -> int:
    return matrix_size_bytes(
        m,
        n,
        bands,
        group_u=recipe.group_u,
        group_v=recipe.group_v,
        has_zero=not recipe.is_symmetric,
    )


def _widest(
    m: int, n: int, recipe: Recipe, leading: Sequence[RankBand], bits: int, *, limit: int
) -> int:
    """Return the largest rank at `bits` that fits beside the leading bands."""
    fits, over = 0, min(m, n) - sum(band.rank for band in leading) + 1
    while over - fits > 1:
        middle = (fits + over) // 2
        if _size(m, n, recipe, [*leading, RankBand(bits, middle)]) <= limit:
            fits = middle
        else:
            over = middle
    return fits


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


def unbiased_noise(bits: int) -> float:
    """Say how much noise a direction gets per unit of its energy when its strength is kept.

    A grid keeps the share 1 - D of a vector; dividing by it leaves noise D / (1 - D) on each side,
    so u sigma v carries (1 + D / (1 - D))^2 - 1.

    Args:
        bits: 1, 2, 3, 4 or 8.

    Returns:
        Noise energy over the energy of the direction.
    """
    error = _GRID_ERROR[bits]
    return (1 + error / (1 - error)) ** 2 - 1


def _plan_spectrum(
    m: int, n: int, recipe: Recipe, energies: Sequence[float], spare_bytes: int
) -> tuple[RankBand, ...]:
    """Give each direction the bits of least loss, at one price per bit for all of them."""
    limit = limit_bytes(m, n, recipe) + spare_bytes
    found = list(energies[: largest_rank(m, n, recipe, spare_bytes=spare_bytes)])
    if not found:
        return ()
    # Directions without energy are worth nothing at any price; one of them keeps the entry whole.
    scale = max(found[0], 1e-300)
    falling = [energy / scale for energy in found]
    # Prices at which a direction is worth its next bits: the slopes of the loss per direction.
    low, high = 1e-18, 1e6
    best: tuple[RankBand, ...] = ()

    # Most prices give bands that one before gave.
    @cache
    def weigh(bands: tuple[RankBand, ...]) -> int:
        return _size(m, n, recipe, bands)

    for _ in range(_BISECTIONS):
        price = (low * high) ** 0.5
        bands = _bands_at(falling, price, recipe)
        if bands and weigh(bands) <= limit:
            best, high = bands, price
        elif not bands:
            high = price
        else:
            low = price
    alive = max(1, sum(energy > 0 for energy in falling))
    return _fill(m, n, recipe, best, alive=alive, limit=limit)


def _bands_at(falling: Sequence[float], price: float, recipe: Recipe) -> tuple[RankBand, ...]:
    """Cut the directions at one price of a bit; a direction kept at b bits costs price * b."""
    widths = _SPECTRUM_BITS
    losses = [recipe.dropped_loss, *(unbiased_noise(bits) for bits in widths)]
    options = _lower_hull(list(zip([0, *widths], losses, strict=True)))
    # How many of the falling energies are worth each step to a wider code.
    prices = [price / _slope(fewer, more) for fewer, more in pairwise(options)]
    reached = [bisect_right(falling, -least, key=operator.neg) for least in prices]
    bands = [
        RankBand(bits, here - further)
        for (bits, _), here, further in zip(options[1:], reached, [*reached[1:], 0], strict=True)
    ]
    return tuple(band for band in reversed(bands) if band.rank)


def _lower_hull(options: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Keep the widths that some price makes the best choice."""
    hull: list[tuple[int, float]] = []
    for option in options:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(fewer: tuple[int, float], more: tuple[int, float]) -> float:
    return (fewer[1] - more[1]) / (more[0] - fewer[0])


def _fill(
    m: int, n: int, recipe: Recipe, bands: Sequence[RankBand], *, alive: int, limit: int
) -> tuple[RankBand, ...]:
    """Round the wide bands down to what kernels like; spend the rest on the narrowest one."""
    narrowest = min(_SPECTRUM_BITS)
    step = _RANK_STEP if min(m, n) >= _LARGE_SIDE else 1
    leading = [
        RankBand(band.bits, band.rank - band.rank % step if band.rank > step else band.rank)
        for band in bands
        if band.bits != narrowest
    ]
    room = alive - sum(band.rank for band in leading)
    rank = min(_widest(m, n, recipe, leading, narrowest, limit=limit), room)
    return (*leading, RankBand(narrowest, rank)) if rank > 0 else tuple(leading)
