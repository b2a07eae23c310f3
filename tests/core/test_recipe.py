import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltacome_core.bands import matrix_size_bytes, plan_bands
from deltacome_core.errors import UserError
from deltacome_core.layout import RankBand, matrix_payload
from deltacome_core.recipe import PRESETS, Recipe, get_recipe


def size_of(shape, bands, recipe):
    return matrix_size_bytes(
        *shape, bands, group_u=recipe.group_u, group_v=recipe.group_v, has_zero=True
    )


def test_the_published_bands_lead_at_4096():
    bands = plan_bands(4096, 4096, PRESETS["come"])
    assert bands[:2] == (RankBand(8, 2), RankBand(3, 32))
    assert bands[2] == RankBand(2, 864)


def test_code_bits_of_the_published_setting_are_one_per_parameter():
    bands = [RankBand(8, 2), RankBand(3, 32), RankBand(2, 968)]
    payload = matrix_payload(
        4096, 4096, bands=bands, group_u=(1, 128), group_v=(1, 128), symmetric=False
    )
    codes = {s.key: s.size_bytes for s in payload.sections if s.key.endswith("codes")}
    assert sum(codes[f"{band}.v.codes"] for band in range(3)) == 4096 * 4096 // 16
    # U's 8-bit and 2-bit rows end in partly used words: 2 codes take 4 bytes, 968 take 244.
    assert codes["0.u.codes"] == 4096 * 4
    assert codes["2.u.codes"] == 4096 * 244


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(64, 5000),
    inn=st.integers(64, 5000),
    budget=st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]),
)
def test_the_plan_fills_the_budget_and_never_exceeds_it(out, inn, budget):
    recipe = get_recipe("come", matrix_bits=budget)
    limit = budget * out * inn / 8
    bands = plan_bands(out, inn, recipe)
    if size_of((out, inn), [RankBand(2, 1)], recipe) > limit:
        assert bands == ()
        return
    assert size_of((out, inn), bands, recipe) <= limit
    assert sum(band.rank for band in bands) <= min(out, inn)
    grown = [*bands[:-1], RankBand(2, bands[-1].rank + 1)]
    is_full_rank = sum(band.rank for band in grown) > min(out, inn)
    assert is_full_rank or size_of((out, inn), grown, recipe) > limit


def test_the_narrow_matrices_of_grouped_queries_get_no_more_bits_than_the_others():
    """The published lists give k and v of 1024 x 4096 as many ranks as q: 2.8 bits."""
    bands = plan_bands(1024, 4096, PRESETS["come"])
    spent = size_of((1024, 4096), bands, PRESETS["come"]) * 8 / (1024 * 4096)
    assert 0.98 < spent <= 1.0


def test_an_unknown_recipe_is_refused():
    with pytest.raises(UserError, match="datafree"):
        get_recipe("gzip")


@pytest.mark.parametrize(
    "wrong",
    [
        {"matrix_bits": 0.0},
        {"matrix_bits": float("nan")},
        {"matrix_bits": 9.0},
        {"embedding_bits": 5},
        {"group_size": 0},
        {"damping": 1.0},
    ],
)
def test_a_recipe_outside_its_limits_is_refused(wrong):
    with pytest.raises(UserError) as caught:
        Recipe(name="come", **wrong)
    assert caught.value.code == "recipe_invalid"
