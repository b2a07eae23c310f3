import json
from pathlib import Path

import pytest
import torch

from benchmarks.compress.__main__ import save
from benchmarks.compress.pair import SPECTRUM, singular_values, write_pair
from benchmarks.compress.published import gptq
from benchmarks.compress.shapes import SHAPES, Shape
from deltacome_core.checkpoint import open_checkpoint
from deltacome_core.compress import compress_checkpoint
from deltacome_core.delta import load_pair
from deltacome_core.recipe import get_recipe

CPU = torch.device("cpu")
TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny-llama" / "backbone"
TINY = Shape(
    name="tiny",
    hidden=256,
    intermediate=384,
    heads=4,
    kv_heads=2,
    layers=1,
    layers_of_model=1,
    vocabulary=1024,
    texts=4,
)


def test_singular_values_follow_the_published_curve():
    shares = singular_values(4096).square().cumsum(dim=0)
    for rank, share in SPECTRUM[1:]:
        assert float(shares[rank - 1]) == pytest.approx(share, abs=0.03)


def test_a_pair_has_the_spectrum_it_was_asked_for_and_can_be_calibrated_on(tmp_path):
    write_pair(tmp_path, TINY, TOKENIZER, CPU)
    base, tuned = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "tuned")
    delta = load_pair(base, tuned, "model.layers.0.self_attn.q_proj.weight").difference()
    energies = torch.linalg.svdvals(delta.double()).square()
    shares = (energies / energies.sum()).cumsum(dim=0)
    assert float(shares[63]) == pytest.approx(0.84, abs=0.03)
    assert delta.norm() / 0.02 / 256 == pytest.approx(0.025, rel=0.05)
    report = compress_checkpoint(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "delta", get_recipe("hub")
    )
    assert report.with_feedback == 7
    assert report.calibration.source == "calibration.jsonl + calibration.txt"


def test_shapes_have_the_parameters_of_their_models():
    def n_params(name):
        shape = SHAPES[name]
        return sum(torch.Size(size).numel() for size in shape.tensors().values())

    assert n_params("llama-2-7b") == 6_738_415_616
    assert n_params("smollm2-135m") == 134_515_008


def test_the_published_quantiser_uses_the_hessian():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(256, 256, generator=generator) * (torch.arange(1, 257) ** -0.6)[:, None]
    x = torch.randn(2000, 256, generator=generator) @ mixing
    hessian, values = x.T @ x, torch.randn(16, 256, generator=generator)

    def loss(decoded):
        return float(((decoded - values) @ hessian * (decoded - values)).sum())

    plain = gptq(values, torch.eye(256), 2)
    assert loss(gptq(values, hessian, 2)) < 0.7 * loss(plain)


def test_rows_of_other_runs_stay_in_the_file(tmp_path):
    out = tmp_path / "rows.json"
    row = {"model": "a", "layers": 2, "recipe": "hub", "devices": "cuda", "seconds": 3}
    save(out, [row, row | {"recipe": "datafree"}], "one")
    save(out, [row | {"seconds": 2}], "two")
    rows = json.loads(out.read_text())["rows"]
    assert [(each["recipe"], each["seconds"], each["commit"]) for each in rows] == [
        ("datafree", 3, "one"),
        ("hub", 2, "two"),
    ]
