import json
import weakref
from dataclasses import replace

import finetunes
import pytest
import torch
from transformers import AutoModelForCausalLM

from deltacome_core import pack_unit, units
from deltacome_core.calibrate import LayerCalibrator
from deltacome_core.checkpoint import open_checkpoint
from deltacome_core.compress import compress_checkpoint, find_calibration, parts_folder
from deltacome_core.container import open_delta
from deltacome_core.entries import ExactEntry, LowRankEntry, RowsEntry, UnchangedEntry
from deltacome_core.errors import UserError
from deltacome_core.inspection import inspect_delta
from deltacome_core.matrices import quantise_matrices
from deltacome_core.packed import PackedRows
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import reconstruct_checkpoint
from deltacome_core.tensors import load_tensor
from deltacome_core.texts import DEFAULT_CALIBRATION
from deltacome_core.vocabulary import pack_vocabulary

COME = get_recipe("come", matrix_bits=3.0)
FREE = get_recipe("datafree", matrix_bits=3.0)


def names_of(delta, kind):
    return {name for name, entry in delta.entries.items() if isinstance(entry, kind)}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_every_family_comes_back_as_a_checkpoint_of_the_same_layout(tmp_path, family, changes):
    base, tuned = finetunes.save_pair(tmp_path, family, dtype=torch.bfloat16, **changes)
    report = compress_checkpoint(base, tuned, tmp_path / "delta", COME)
    reconstruct_checkpoint(base, tmp_path / "delta", tmp_path / "back")
    truth, back = open_checkpoint(tuned), open_checkpoint(tmp_path / "back")
    assert back.layout == truth.layout
    for name in names_of(open_delta(tmp_path / "delta"), ExactEntry):
        assert torch.equal(load_tensor(back, name), load_tensor(truth, name))
    assert report.entries["lowrank"] == 14
    assert report.entries["rows"] == (1 if changes.get("tie_word_embeddings") else 2)
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_biases_and_norms_are_exact(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path, "qwen2")
    compress_checkpoint(base, tuned, tmp_path / "delta", FREE)
    exact = names_of(open_delta(tmp_path / "delta"), ExactEntry)
    assert {name.rpartition(".")[2] for name in exact} == {"weight", "bias"}
    assert len([name for name in exact if name.endswith("bias")]) == 6
    assert len([name for name in exact if "norm" in name]) == 5


def test_every_matrix_stays_within_its_budget(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path)
    compress_checkpoint(base, tuned, tmp_path / "delta", FREE)
    for entry in open_delta(tmp_path / "delta").entries.values():
        if isinstance(entry, LowRankEntry):
            assert entry.payload.size_bytes * 8 <= 3.0 * entry.shape[0] * entry.shape[1]


def test_the_report_counts_the_files_on_disk(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path)
    report = compress_checkpoint(base, tuned, tmp_path / "delta", COME)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "delta").iterdir()}
    assert report.total_bytes == sizes["delta.safetensors"] + sizes["delta.json"]
    weights = sum(path.stat().st_size for path in tuned.glob("*.safetensors"))
    assert report.ratio == pytest.approx(weights / report.total_bytes)
    assert report.bits_per_param == pytest.approx(8 * report.total_bytes / report.n_params)
    assert 50 << 20 < report.peak_host_bytes < 8 << 30
    assert report.stages["scan"] > 0
    assert report.calibration.source == "calibration.txt"
    assert json.loads(json.dumps(report.to_json()))["total_bytes"] == report.total_bytes


def test_the_delta_carries_the_fine_tunes_sidecars(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path)
    compress_checkpoint(base, tuned, tmp_path / "delta", FREE)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "delta" / name).read_bytes() == (tuned / name).read_bytes()


def test_identical_checkpoints_cost_a_header_and_need_no_model(tmp_path):
    base = finetunes.save(finetunes.make_model(), tmp_path / "base")
    tuned = finetunes.save(finetunes.make_model(), tmp_path / "tuned")
    report = compress_checkpoint(base, tuned, tmp_path / "delta", COME)
    delta = open_delta(tmp_path / "delta")
    assert names_of(delta, UnchangedEntry) == set(delta.names)
    assert report.total_bytes < 16_000
    assert report.payload_bytes == 0
    assert not list((tmp_path / "delta").glob("*.safetensors"))
    reconstruct_checkpoint(base, tmp_path / "delta", tmp_path / "back")
    back, truth = open_checkpoint(tmp_path / "back"), open_checkpoint(tuned)
    assert all(torch.equal(load_tensor(back, n), load_tensor(truth, n)) for n in truth.tensors)


def test_a_grown_vocabulary_keeps_its_new_rows_exactly(tmp_path):
    model = finetunes.make_model()
    base = finetunes.save(model, tmp_path / "base")
    model.resize_token_embeddings(finetunes.VOCABULARY + 7, mean_resizing=False)
    tuned = finetunes.save(finetunes.perturb(model), tmp_path / "tuned")
    compress_checkpoint(base, tuned, tmp_path / "delta", FREE)
    delta = open_delta(tmp_path / "delta")
    assert names_of(delta, RowsEntry) == {"model.embed_tokens.weight", "lm_head.weight"}
    reconstruct_checkpoint(base, tmp_path / "delta", tmp_path / "back")
    for name in names_of(delta, RowsEntry):
        ours = load_tensor(open_checkpoint(tmp_path / "back"), name)
        truth = load_tensor(open_checkpoint(tuned), name)
        assert torch.equal(ours[-7:], truth[-7:])
        assert torch.allclose(ours, truth, atol=0.02)


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_over_its_budget_gets_a_basis(tmp_path, tied):
    base, tuned = finetunes.save_pair(tmp_path, tie_word_embeddings=tied)
    recipe = replace(get_recipe("hub", matrix_bits=3.0), vocabulary_rank=16)
    compress_checkpoint(base, tuned, tmp_path / "delta", recipe)
    delta = open_delta(tmp_path / "delta")
    names = names_of(delta, RowsEntry)
    assert names == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    reconstruct_checkpoint(base, tmp_path / "delta", tmp_path / "back")
    for name in names:
        rows = delta.load(name)
        assert rows.basis.shape == (16, rows.cols)
        before, truth, ours = (
            load_tensor(open_checkpoint(folder), name)
            for folder in (base, tuned, tmp_path / "back")
        )
        assert torch.linalg.norm(ours - truth) < 0.95 * torch.linalg.norm(before - truth)
        assert torch.allclose(ours, before * rows.base_scale + rows.dequantise(), atol=1e-6)


def test_only_rows_that_changed_are_packed(tmp_path):
    model = finetunes.make_model()
    base = finetunes.save(model, tmp_path / "base")
    with torch.no_grad():
        model.model.embed_tokens.weight[[5, 77]] += 0.3
    tuned = finetunes.save(model, tmp_path / "tuned")
    compress_checkpoint(base, tuned, tmp_path / "delta", FREE)
    delta = open_delta(tmp_path / "delta")
    rows = delta.load("model.embed_tokens.weight")
    assert isinstance(rows, PackedRows)
    assert rows.changed.nonzero().flatten().tolist() == [5, 77]
    assert len(names_of(delta, UnchangedEntry)) == len(delta.names) - 1


def test_shards_and_one_file_give_the_same_payloads(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path)
    cut = tmp_path / "cut"
    finetunes.save(AutoModelForCausalLM.from_pretrained(tuned), cut, max_shard_size="200KB")
    (cut / "calibration.txt").write_text(finetunes.CALIBRATION)
    compress_checkpoint(base, tuned, tmp_path / "a", COME)
    compress_checkpoint(base, cut, tmp_path / "b", COME)
    first, second = ((tmp_path / d / "delta.safetensors").read_bytes() for d in "ab")
    assert first == second


def test_a_hessian_is_let_go_once_its_matrices_are_packed(tmp_path, monkeypatch):
    base, tuned = finetunes.save_pair(tmp_path)
    seen = []

    def watch(deltas, recipe, *, hessian, **options):
        assert not any(earlier() is not None for earlier in seen)
        seen.append(weakref.ref(hessian))
        return quantise_matrices(deltas, recipe, hessian=hessian, **options)

    monkeypatch.setattr(pack_unit, "quantise_matrices", watch)
    compress_checkpoint(base, tuned, tmp_path / "delta", get_recipe("hub"))
    # Of each of two layers: what q, k and v read, what o, gate and up, and down read.
    assert len(seen) == 8


def test_the_states_are_let_go_before_the_vocabulary_is_packed(tmp_path, monkeypatch):
    base, tuned = finetunes.save_pair(tmp_path)
    recipe = replace(get_recipe("hub", matrix_bits=3.0), vocabulary_rank=16)
    made, packed = [], []

    def make(*args):
        calibrator = LayerCalibrator(*args)
        made.append(weakref.ref(calibrator))
        return calibrator

    def watch(name, *args, **options):
        packed.append(name)
        assert [each() for each in made] == [None]
        return pack_vocabulary(name, *args, **options)

    monkeypatch.setattr(units, "LayerCalibrator", make)
    monkeypatch.setattr(pack_unit, "pack_vocabulary", watch)
    compress_checkpoint(base, tuned, tmp_path / "delta", recipe)
    assert packed == ["lm_head.weight", "model.embed_tokens.weight"]


def test_progress_names_every_layer_once(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path)
    seen = []
    compress_checkpoint(base, tuned, tmp_path / "delta", COME, on_layer=seen.append)
    assert [done.group for done in seen] == ["model.layers.0", "model.layers.1", "rest"]
    assert [done.index for done in seen] == [0, 1, 2]
    assert [done.n_matrices for done in seen] == [7, 7, 0]
    assert all(0 < done.relative_error < 0.6 for done in seen[:2])
    assert not any(done.resumed for done in seen)


def test_parts_are_gone_when_the_delta_is_whole(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path)
    compress_checkpoint(base, tuned, tmp_path / "delta", FREE)
    assert not parts_folder(tmp_path / "delta").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "delta"}


def test_an_existing_output_is_left_alone(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path)
    with pytest.raises(UserError) as caught:
        compress_checkpoint(base, tuned, tuned, FREE)
    assert caught.value.code == "output_exists"


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_weights_that_are_not_finite_are_refused_on_either_side(tmp_path, which):
    folders = dict(zip(("base", "tuned"), finetunes.save_pair(tmp_path), strict=True))
    broken = finetunes.make_model()
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = torch.nan
    finetunes.save(broken, folders[which])
    with pytest.raises(UserError) as caught:
        compress_checkpoint(folders["base"], folders["tuned"], tmp_path / "delta", COME)
    assert caught.value.code == "nan_weights"
    assert caught.value.params["tensors"] == ["lm_head.weight (model.safetensors)"]


def test_a_fine_tune_of_another_backbone_is_refused(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path)
    finetunes.save(finetunes.make_model(hidden_size=64), base)
    with pytest.raises(UserError) as caught:
        compress_checkpoint(base, tuned, tmp_path / "delta", COME)
    assert caught.value.code == "backbone_mismatch"


def test_a_device_that_is_not_there_is_named(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path)
    for device in ("cuda:17", "typewriter"):
        with pytest.raises(UserError) as caught:
            compress_checkpoint(base, tuned, tmp_path / "delta", COME, device=device)
        assert caught.value.code == "device_unavailable"


def test_short_calibration_is_refused_before_any_work(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path)
    (tuned / "calibration.txt").write_text("a few words")
    with pytest.raises(UserError) as caught:
        compress_checkpoint(base, tuned, tmp_path / "delta", COME)
    assert caught.value.code == "calibration_too_short"
    assert not parts_folder(tmp_path / "delta").exists()


def test_the_backbones_tokenizer_stands_in(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tuned / name).unlink()
    compress_checkpoint(base, tuned, tmp_path / "delta", COME)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    with pytest.raises(UserError) as caught:
        compress_checkpoint(base, tuned, tmp_path / "other", COME)
    assert caught.value.code == "tokenizer_missing"


def test_the_fine_tunes_own_calibration_is_preferred(tmp_path):
    assert find_calibration(tmp_path) == DEFAULT_CALIBRATION
    (tmp_path / "calibration.txt").touch()
    assert find_calibration(tmp_path).name == "calibration.txt"
    (tmp_path / "calibration.jsonl").touch()
    assert find_calibration(tmp_path).name == "calibration.jsonl"


def test_inspection_agrees_with_the_report(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path)
    report = compress_checkpoint(base, tuned, tmp_path / "delta", FREE)
    inspected = inspect_delta(tmp_path / "delta")
    assert inspected.sizes.total_bytes == report.total_bytes
    assert inspected.manifest.calibration is None


def test_a_matrix_too_small_for_any_band_is_kept_exactly(tmp_path):
    small = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 1}
    base, tuned = finetunes.save_pair(tmp_path, dtype=torch.bfloat16, **small)
    recipe = get_recipe("come", matrix_bits=1.0)
    compress_checkpoint(base, tuned, tmp_path / "delta", recipe)
    delta = open_delta(tmp_path / "delta")
    narrow = {name for name in delta.names if "k_proj" in name or "v_proj" in name}
    assert narrow <= names_of(delta, ExactEntry)
    reconstruct_checkpoint(base, tmp_path / "delta", tmp_path / "back")
    back, truth = open_checkpoint(tmp_path / "back"), open_checkpoint(tuned)
    assert all(torch.equal(load_tensor(back, n), load_tensor(truth, n)) for n in narrow)
