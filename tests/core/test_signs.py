import finetunes
import pytest
import torch

from deltacome_core.bitpack import unpack_codes
from deltacome_core.compress import compress_checkpoint
from deltacome_core.container import open_delta
from deltacome_core.entries import DirectEntry, slice_name
from deltacome_core.errors import UserError
from deltacome_core.factorise import NamedDelta
from deltacome_core.recipe import PRESETS, get_recipe
from deltacome_core.reconstruct import apply_entry
from deltacome_core.signs import quantise_signs
from deltacome_core.slices import slice_tensor
from deltacome_core.verify import verify_delta

BY_MATRIX, BY_ROW = PRESETS["bitdelta"], PRESETS["bitdelta-row"]


def keep_signs(delta, recipe):
    (made,) = quantise_signs([NamedDelta(name="w", delta=delta)], recipe)
    return made


def test_every_weight_becomes_plus_or_minus_the_mean_magnitude():
    delta = torch.tensor([[1.0, -3.0, 2.0], [-0.5, 0.25, -1.25]])
    made = keep_signs(delta, BY_MATRIX)
    mean = 8 / 6
    expected = torch.tensor([[mean, -mean, mean], [-mean, mean, -mean]])
    torch.testing.assert_close(made.packed.dequantise(), expected, rtol=2**-11, atol=0)
    assert (made.packed.factor.group, made.packed.factor.scale.shape) == ((0, 0), (1, 1))


def test_a_scale_per_row_is_the_mean_magnitude_of_the_row():
    delta = torch.tensor([[1.0, -3.0, 2.0], [-0.5, 0.25, -0.75]])
    made = keep_signs(delta, BY_ROW)
    expected = torch.tensor([[2.0, -2.0, 2.0], [-0.5, 0.5, -0.5]])
    assert torch.equal(made.packed.dequantise(), expected)
    assert made.packed.factor.scale.shape == (2, 1)


def test_a_weight_that_stayed_counts_as_grown_whatever_the_sign_of_its_zero():
    delta = torch.tensor([[0.0, -0.0, -1.0]])
    codes = unpack_codes(keep_signs(delta, BY_MATRIX).packed.factor.codes, 1, 3)
    assert codes.tolist() == [[1, 1, 0]]


def test_a_row_that_stayed_stays():
    delta = torch.zeros(3, 40)
    delta[1] = 0.5
    values = keep_signs(delta, BY_ROW).packed.dequantise()
    assert torch.count_nonzero(values[[0, 2]]) == 0
    assert torch.equal(values[1], delta[1])


@pytest.mark.parametrize("recipe", [BY_MATRIX, BY_ROW], ids=lambda recipe: recipe.name)
def test_the_scale_has_the_least_squared_error_of_all(recipe):
    delta = torch.randn((50, 70), generator=torch.Generator().manual_seed(0))
    delta *= torch.logspace(0, -2, 50)[:, None]
    made = keep_signs(delta, recipe)
    values = made.packed.dequantise()
    error = (values - delta).norm()
    assert made.relative_error == pytest.approx(float(error / delta.norm()), rel=1e-5)
    for factor in (0.98, 1.02):
        assert (factor * values - delta).norm() > error


def test_scales_per_row_fit_rows_of_different_size():
    delta = torch.randn((50, 70), generator=torch.Generator().manual_seed(0))
    delta *= torch.logspace(0, -2, 50)[:, None]
    errors = [keep_signs(delta, recipe).relative_error for recipe in (BY_ROW, BY_MATRIX)]
    # Signs of Gaussian numbers miss sqrt(1 - 2 / pi) of them.
    assert errors[0] == pytest.approx(0.603, abs=0.02)
    assert errors[0] < 0.75 * errors[1]


def test_a_huge_change_keeps_a_finite_scale():
    made = keep_signs(torch.full((2, 3), 1e6), BY_MATRIX)
    assert bool(torch.isfinite(made.packed.dequantise()).all())


@pytest.mark.parametrize("name", ["bitdelta", "bitdelta-row"])
def test_a_size_is_refused_by_name(name):
    with pytest.raises(UserError) as caught:
        get_recipe(name, matrix_bits=2.0)
    assert caught.value.code == "budget_fixed"
    assert f"{name} has one size, which follows from the fine-tune; 2 bits" in str(caught.value)


@pytest.mark.parametrize("recipe", [BY_MATRIX, BY_ROW], ids=lambda recipe: recipe.name)
def test_a_fine_tune_is_compressed_verified_and_the_same_twice(trained_pair, tmp_path, recipe):
    base, tuned = trained_pair
    report = compress_checkpoint(base, tuned, tmp_path / "delta", recipe)
    compress_checkpoint(base, tuned, tmp_path / "again", recipe)
    for path in (tmp_path / "delta").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    delta = open_delta(tmp_path / "delta")
    entries = [entry for entry in delta.entries.values() if isinstance(entry, DirectEntry)]
    assert len(entries) == report.entries["direct"] == 14
    assert "lowrank" not in report.entries
    assert {(entry.bits, entry.symmetric) for entry in entries} == {(1, True)}
    verified = verify_delta(base, tuned, tmp_path / "delta")
    errors = {error.name: error.relative_error for error in verified.matrices}
    assert {entry.name for entry in entries} <= set(errors)
    # Signs keep sqrt(1 - 2/pi) = .60 of a Gaussian matrix; training moves some far more.
    assert all(0.3 < errors[entry.name] < 1 for entry in entries)
    assert verified.recovery > 0


def test_transposed_experts_have_a_scale_for_each_output():
    stack = slice_tensor("experts.up_proj", (3, 40, 50), {slice_name("experts.up_proj", 0)})
    delta = torch.randn((3, 40, 50), generator=torch.Generator().manual_seed(1))
    made = quantise_signs(stack.split(delta), BY_ROW)
    packed = stack.join({each.packed.name: each.packed for each in made})
    assert [each.factor.scale.shape for each in packed.slices] == [(50, 1)] * 3
    rebuilt = apply_entry(torch.zeros_like(delta), packed)
    mean = delta.abs().mean(dim=1, keepdim=True)
    torch.testing.assert_close(rebuilt, torch.where(delta >= 0, mean, -mean), rtol=1e-3, atol=0)


def test_embeddings_follow_the_bits_of_the_recipe(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path)
    compress_checkpoint(base, tuned, tmp_path / "delta", BY_MATRIX)
    entry = open_delta(tmp_path / "delta").entry("model.embed_tokens.weight")
    assert entry.bits == BY_MATRIX.embedding_bits == 4
