import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltacome_core.bands import largest_rank, limit_bytes, matrix_size_bytes, plan_bands
from deltacome_core.bands import unbiased_noise as noise
from deltacome_core.layout import RankBand
from deltacome_core.recipe import PRESETS, get_recipe

HUB = PRESETS["hub"]


def long_tail(n, power=1.2):
    return [(1 + index) ** -power for index in range(n)]


def size_of(shape, bands, recipe=HUB):
    return matrix_size_bytes(
        *shape, bands, group_u=recipe.group_u, group_v=recipe.group_v, has_zero=False
    )


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(128, 3000),
    inn=st.integers(128, 3000),
    budget=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    power=st.sampled_from([0.3, 1.0, 2.0]),
)
def test_bands_fitted_to_the_spectrum_fill_the_budget_and_never_exceed_it(out, inn, budget, power):
    recipe = get_recipe("hub", matrix_bits=budget)
    bands = plan_bands(out, inn, recipe, energies=long_tail(min(out, inn), power))
    limit = limit_bytes(out, inn, recipe)
    assert size_of((out, inn), bands, recipe) <= limit
    # A row of U comes in whole words: what is left does not pay for one more in each.
    if min(out, inn) >= 1024 and budget >= 0.5:
        *wider, last = bands
        more = (*wider, RankBand(last.bits, last.rank + 32))
        assert size_of((out, inn), more, recipe) > limit
    assert [band.bits for band in bands] == sorted({b.bits for b in bands}, reverse=True)


def test_a_steep_spectrum_gets_wider_codes_than_a_flat_one():
    def leading(power):
        bands = plan_bands(1024, 1024, HUB, energies=long_tail(1024, power))
        return sum(band.rank for band in bands if band.bits > 2)

    assert leading(2.0) > leading(1.0) > leading(0.1)


def test_no_exchange_of_bits_between_two_directions_lowers_the_loss():
    """The plan is the optimum of its model: moving a bit from one direction to another loses."""
    energies = long_tail(512, 1.0)
    bands = plan_bands(512, 512, HUB, energies=energies)
    widths = [band.bits for band in bands for _ in range(band.rank)]
    loss = {0: HUB.dropped_loss} | {bits: noise(bits) for bits in (1, 2, 3, 4)}
    gains = [e * (loss[w] - loss[w + 1]) for e, w in zip(energies, widths, strict=False) if w < 4]
    costs = [e * (loss[w - 1] - loss[w]) for e, w in zip(energies, widths, strict=False) if w > 1]
    # The budget is met to within one vector of the last band, so the slopes meet to within one too.
    assert max(gains) <= 1.15 * min(costs)


def test_directions_without_energy_get_no_bytes():
    energies = [1.0] * 8 + [0.0] * 504
    bands = plan_bands(512, 512, HUB, energies=energies)
    assert sum(band.rank for band in bands) == 8
    assert {band.bits for band in bands} == {8}


def test_an_unchanged_looking_matrix_still_has_a_band():
    bands = plan_bands(512, 512, HUB, energies=[0.0] * 512)
    assert sum(band.rank for band in bands) == 1


def test_large_matrices_get_ranks_that_kernels_like():
    bands = plan_bands(4096, 4096, HUB, energies=long_tail(4096, 0.9))
    assert all(band.rank % 16 == 0 for band in bands[:-1] if band.rank > 16)


@pytest.mark.parametrize(("name", "bits"), [("hub", 1), ("come", 2), ("lowrank", 8)])
def test_the_largest_rank_is_that_of_the_narrowest_codes(name, bits):
    recipe = PRESETS[name]
    rank = largest_rank(512, 768, recipe)
    sizes = [
        matrix_size_bytes(
            512,
            768,
            [RankBand(bits, r)],
            group_u=recipe.group_u,
            group_v=recipe.group_v,
            has_zero=not recipe.is_symmetric,
        )
        for r in (rank, rank + 1)
    ]
    assert sizes[0] <= limit_bytes(512, 768, recipe) < sizes[1]


def test_noise_falls_with_every_bit():
    assert all(noise(a) > noise(b) for a, b in itertools.pairwise((1, 2, 3, 4, 8)))
