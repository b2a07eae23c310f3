"""Budgets for the whole delta, and plans from headers."""

from pathlib import Path

import finetunes
import pytest
import torch

from deltacome_core.budget import Budget, fit_recipe
from deltacome_core.checkpoint import open_checkpoint
from deltacome_core.cli_plan import plan_rows
from deltacome_core.compress import compress_checkpoint
from deltacome_core.entries import ExactEntry, MatrixEntry, RowsEntry
from deltacome_core.errors import UserError
from deltacome_core.inspection import inspect_delta
from deltacome_core.plan import Subject, plan_delta
from deltacome_core.predict import predict_error, read_spectra
from deltacome_core.recipe import get_recipe
from deltacome_core.shards import tensor_size

EXAMPLES = Path(__file__).parents[2] / "examples" / "tiny-llama"
BASE, TUNED = EXAMPLES / "backbone", EXAMPLES / "dates"


def subject_of(folder):
    tuned = open_checkpoint(folder)
    return Subject(
        layout=tuned.layout,
        source_bytes=tuned.size_bytes,
        sidecars=[path.name for path in tuned.sidecars],
    )


@pytest.mark.parametrize("name", ["datafree", "lowrank"])
@pytest.mark.parametrize("ratio", [8, 16, 32])
def test_a_budget_is_met_within_one_per_cent_from_below(tmp_path, name, ratio):
    report = compress_checkpoint(
        BASE, TUNED, tmp_path / "delta", get_recipe(name), budget=Budget(ratio=ratio)
    )
    assert ratio <= report.ratio <= ratio / 0.99


def test_the_three_ways_to_say_a_budget_agree():
    subject = subject_of(TUNED)
    recipe = get_recipe("hub")
    limit = subject.source_bytes // 16
    said = [
        Budget(total_bytes=limit),
        Budget(ratio=subject.source_bytes / limit),
        Budget(bits_per_param=limit * 8 / subject.n_params),
    ]
    bits = [fit_recipe(subject, recipe, budget).matrix_bits for budget in said]
    assert max(bits) - min(bits) < 1e-3 * bits[0]


@pytest.mark.parametrize("asked", [{}, {"ratio": 2.0, "total_bytes": 5}, {"ratio": -1.0}])
def test_a_budget_is_one_positive_number(asked):
    with pytest.raises(UserError) as caught:
        Budget(**asked)
    assert caught.value.code == "budget_invalid"


def test_an_impossible_budget_names_the_smallest_which_is_possible(tmp_path):
    subject = subject_of(TUNED)
    with pytest.raises(UserError) as caught:
        fit_recipe(subject, get_recipe("datafree"), Budget(total_bytes=50_000))
    assert caught.value.code == "budget_impossible"
    smallest = caught.value.params["smallest"]
    report = compress_checkpoint(
        BASE,
        TUNED,
        tmp_path / "delta",
        get_recipe("datafree"),
        budget=Budget(total_bytes=smallest),
    )
    assert report.total_bytes <= smallest


@pytest.mark.parametrize("name", ["bitdelta", "lossless"])
def test_a_recipe_of_one_size_takes_no_budget(name):
    with pytest.raises(UserError) as caught:
        fit_recipe(subject_of(TUNED), get_recipe(name), Budget(ratio=16))
    assert caught.value.code == "budget_fixed"


@pytest.mark.parametrize("name", ["datafree", "lowrank", "bitdelta", "bitdelta-row"])
def test_a_plan_from_headers_is_what_compression_makes(tmp_path, name):
    recipe = get_recipe(name)
    compress_checkpoint(BASE, TUNED, tmp_path / "delta", recipe)
    made = inspect_delta(tmp_path / "delta")
    plan = plan_delta(subject_of(TUNED), recipe)
    entries = made.manifest.entries
    matrices = sum(entry.size_bytes for entry in entries if isinstance(entry, MatrixEntry))
    rows = sum(entry.payload.size_bytes for entry in entries if isinstance(entry, RowsEntry))
    assert plan.n_matrices == made.n_matrices
    assert 0.99 * plan.matrix_bytes <= matrices <= plan.matrix_bytes
    assert rows == plan.vocabulary_bytes
    assert any(isinstance(entry, ExactEntry) for entry in entries)
    assert plan.exact_bytes == made.sizes.exact
    assert 0.98 * plan.total_bytes < made.total_bytes <= plan.total_bytes


def test_a_lossless_plan_counts_whole_tensors(tmp_path):
    recipe = get_recipe("lossless")
    report = compress_checkpoint(BASE, TUNED, tmp_path / "delta", recipe)
    plan = plan_delta(subject_of(TUNED), recipe)
    layout = open_checkpoint(TUNED).layout
    assert plan.exact_bytes == sum(tensor_size(*place) for place in layout.values())
    assert report.total_bytes < plan.total_bytes


def test_unchanged_tensors_leave_the_others_more(tmp_path):
    model = finetunes.make_model()
    base = finetunes.save(model, tmp_path / "base")
    with torch.no_grad():
        for layer in model.model.layers[:1]:
            layer.mlp.up_proj.weight.add_(0.01 * torch.randn_like(layer.mlp.up_proj.weight))
    tuned = finetunes.save(model, tmp_path / "tuned")
    budget = Budget(ratio=100)
    report = compress_checkpoint(
        base, tuned, tmp_path / "delta", get_recipe("datafree"), budget=budget
    )
    assert report.ratio >= 100
    assert report.entries["unchanged"] == len(open_checkpoint(tuned).layout) - 1


def test_each_expert_of_a_stack_is_a_matrix_of_the_plan():
    recipe = get_recipe("come")
    name = "model.layers.0.mlp.experts.down_proj"

    def plan(layout):
        return plan_delta(Subject(layout=layout, source_bytes=1), recipe)

    stack = plan({name: ("BF16", (3, 512, 256))})
    one = plan({name: ("BF16", (512, 256))})
    assert (stack.n_matrices, stack.matrix_bytes) == (3, 3 * one.matrix_bytes)
    biases = plan({f"{name}_bias": ("BF16", (64, 256))})
    assert (biases.n_matrices, biases.exact_bytes) == (0, 64 * 256 * 2)


SHAPES = {
    "llama-2-7b": (32, 4096, 11008, 4096, 32000, 14.0),
    "llama-3-8b": (32, 4096, 14336, 1024, 128256, 10.0),
    "qwen2.5-7b": (28, 3584, 18944, 512, 152064, 10.0),
}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_large_models_are_as_many_times_smaller_as_promised(name):
    """With every row of embedding and head changed."""
    layers, hidden, inner, narrow, vocabulary, asked = SHAPES[name]
    layout = {
        "model.embed_tokens.weight": ("BF16", (vocabulary, hidden)),
        "lm_head.weight": ("BF16", (vocabulary, hidden)),
        "model.norm.weight": ("BF16", (hidden,)),
    }
    for index in range(layers):
        at = f"model.layers.{index}"
        for site, shape in (
            ("self_attn.q_proj", (hidden, hidden)),
            ("self_attn.k_proj", (narrow, hidden)),
            ("self_attn.v_proj", (narrow, hidden)),
            ("self_attn.o_proj", (hidden, hidden)),
            ("mlp.gate_proj", (inner, hidden)),
            ("mlp.up_proj", (inner, hidden)),
            ("mlp.down_proj", (hidden, inner)),
        ):
            layout[f"{at}.{site}.weight"] = ("BF16", shape)
        layout[f"{at}.input_layernorm.weight"] = ("BF16", (hidden,))
        layout[f"{at}.post_attention_layernorm.weight"] = ("BF16", (hidden,))
    n_params = sum(rows * (cols[0] if cols else 1) for _, (rows, *cols) in layout.values())
    plan = plan_delta(Subject(layout=layout, source_bytes=2 * n_params), get_recipe("hub"))
    assert plan.ratio >= asked
    by_ratio = fit_recipe(
        Subject(layout=layout, source_bytes=2 * n_params), get_recipe("hub"), Budget(ratio=asked)
    )
    assert by_ratio.matrix_bits > get_recipe("hub").matrix_bits


def test_the_predicted_error_is_near_that_of_the_delta(tmp_path):
    recipe = get_recipe("datafree")
    base, tuned = open_checkpoint(BASE), open_checkpoint(TUNED)
    spectra = read_spectra(base, tuned, device=torch.device("cpu"))
    errors = []
    compress_checkpoint(
        BASE,
        TUNED,
        tmp_path / "delta",
        recipe,
        on_layer=lambda done: errors.append(done.relative_error) if done.n_matrices else None,
    )
    mean = sum(errors) / len(errors)
    assert predict_error(spectra, recipe) == pytest.approx(mean, rel=0.15)
    wider = predict_error(spectra, get_recipe("datafree", matrix_bits=2.0))
    assert wider < 0.7 * predict_error(spectra, recipe)


def test_a_plan_of_three_ratios_says_what_each_costs_and_loses():
    rows = plan_rows(BASE, TUNED, get_recipe("datafree"), budget=None, measure=True, device="cpu")
    assert [row.budget for row in rows] == [
        None,
        "a ratio of 8",
        "a ratio of 16",
        "a ratio of 32",
    ]
    errors = [row.predicted_error for row in rows[1:]]
    assert errors == sorted(errors)
    (impossible,) = plan_rows(
        BASE,
        TUNED,
        get_recipe("datafree"),
        budget=Budget(ratio=1000),
        measure=False,
        device="cpu",
    )
    assert impossible.plan is None
    assert "impossible" in impossible.describe()
