"""Telling a fine-tune of this backbone from one of another backbone with the same shapes."""

import json

import finetunes
import pytest
import torch
from factories_core import write_checkpoint

from deltacome_core.checkpoint import open_checkpoint
from deltacome_core.cli import main
from deltacome_core.compress import compress_checkpoint, parts_folder
from deltacome_core.distance import (
    COMPARED_MATRICES,
    COMPARED_NUMBERS,
    LARGEST_DISTANCE,
    check_related,
    measure_distance,
)
from deltacome_core.errors import UserError
from deltacome_core.recipe import get_recipe

FREE = get_recipe("datafree", matrix_bits=2.0)


def layers(change, *, n=30, rows=40, cols=50, seed=0):
    """A backbone of n matrices and a fine-tune made by `change` of number and values."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(n)]
    base = {name: torch.randn(rows, cols, generator=generator) for name in names}
    tuned = {name: change(number, base[name]) for number, name in enumerate(names)}
    return base, tuned


def distance(folder, base, tuned):
    pair = (write_checkpoint(folder / side, each) for side, each in (("b", base), ("t", tuned)))
    return measure_distance(*map(open_checkpoint, pair))


@pytest.mark.parametrize("size", [0.001, 0.1, 0.5])
def test_a_change_of_known_size_is_measured(tmp_path, size):
    def change(number, values):
        noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(number + 100))
        return values + size * noise * values.norm() / noise.norm()

    found = distance(tmp_path, *layers(change))
    assert found == pytest.approx(size, rel=1e-3)
    assert found < LARGEST_DISTANCE


@pytest.mark.parametrize("ratio", [0.01, 0.3, 1.0, 5.0])
def test_strangers_are_further_away_than_the_limit_whatever_their_size(tmp_path, ratio):
    def change(number, values):
        generator = torch.Generator().manual_seed(number + 100)
        return ratio * torch.randn(values.shape, generator=generator)

    found = distance(tmp_path, *layers(change))
    assert found == pytest.approx((1 + ratio**2) ** 0.5, rel=0.05)
    assert found > LARGEST_DISTANCE


def test_some_matrices_that_were_made_anew_do_not_make_a_stranger(tmp_path):
    found = distance(
        tmp_path, *layers(lambda number, values: -9 * values if number % 3 == 0 else 1.01 * values)
    )
    assert found == pytest.approx(0.01, rel=1e-3)


def test_vocabularies_norms_other_shapes_and_integers_are_not_compared(tmp_path):
    base = {
        "model.embed_tokens.weight": torch.ones(64, 64),
        "model.norm.weight": torch.ones(64),
        "model.layers.0.a.weight": torch.ones(64, 64),
        "model.layers.0.b.weight": torch.ones(64, 64, dtype=torch.int32),
    }
    tuned = {name: -values for name, values in base.items()}
    tuned["model.layers.0.a.weight"] = torch.ones(64, 65)
    assert distance(tmp_path, base, tuned) == 0.0


def test_an_empty_backbone_is_related_to_itself_alone(tmp_path):
    zeros, ones = ({"model.layers.0.a.weight": torch.full((40, 40), v)} for v in (0.0, 1.0))
    assert distance(tmp_path / "same", zeros, zeros) == 0.0
    assert distance(tmp_path / "other", zeros, ones) > LARGEST_DISTANCE


def test_only_the_first_numbers_of_a_large_matrix_are_read(tmp_path):
    rows = 2 * COMPARED_NUMBERS // 64
    base = {"model.layers.0.a.weight": torch.ones(rows, 64)}
    tuned = {name: values.clone() for name, values in base.items()}
    tuned["model.layers.0.a.weight"][rows // 2 :] = -1.0
    assert distance(tmp_path, base, tuned) == 0.0
    assert COMPARED_MATRICES * COMPARED_NUMBERS < 1 << 25


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strangers")
    base = finetunes.save(finetunes.make_model(seed=0), folder / "base")
    other = finetunes.perturb(finetunes.make_model(seed=5))
    return base, finetunes.save(other, folder / "tuned")


def test_a_fine_tune_of_another_backbone_is_refused_before_any_work(strangers, tmp_path):
    with pytest.raises(UserError) as caught:
        compress_checkpoint(*strangers, tmp_path / "delta", FREE)
    assert caught.value.code == "backbone_unrelated"
    assert 1.4 < float(caught.value.params["ratio"]) < 1.7
    assert caught.value.params["limit"] == f"{LARGEST_DISTANCE:g}"
    assert not parts_folder(tmp_path / "delta").exists()
    assert compress_checkpoint(*strangers, tmp_path / "delta", FREE, force=True).n_matrices == 14


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_left_to_the_check_that_names_them(tmp_path, poison):
    base, tuned = layers(lambda _number, values: values * 1.01, n=3)
    for values in tuned.values():
        values[0, 0] = poison
    pair = [write_checkpoint(tmp_path / side, each) for side, each in (("b", base), ("t", tuned))]
    with pytest.raises(UserError) as caught:
        compress_checkpoint(*pair, tmp_path / "delta", FREE)
    assert caught.value.code == "nan_weights"


def test_a_real_fine_tune_is_related(trained_pair):
    check_related(*map(open_checkpoint, trained_pair))


def test_the_command_line_says_the_ratio_and_takes_force(strangers, tmp_path, capsys):
    options = ["--base", str(strangers[0]), "--tuned", str(strangers[1]), "--recipe", "datafree"]
    options += ["--out", str(tmp_path / "delta"), "--json"]
    with pytest.raises(SystemExit) as left:
        main(["compress", *options])
    failure = json.loads(capsys.readouterr().out)["error"]
    assert (left.value.code, failure["code"]) == (12, "backbone_unrelated")
    assert failure["params"]["ratio"] in failure["message"]
    assert "--force" in failure["message"]
    with pytest.raises(SystemExit) as left:
        main(["compress", *options, "--force"])
    assert left.value.code == 0
