"""Each supported class, from what transformers saves to logits of the rebuilt checkpoint."""

import re
from pathlib import Path

import architectures
import finetunes
import pytest
import torch
import transformers
from architecture_packs import COME, FREE, multiply_out
from architectures import ARCHITECTURES, EXPERTS
from safetensors.torch import load_file, save_file

from deltacome_core.checkpoint import open_checkpoint
from deltacome_core.compress import compress_checkpoint
from deltacome_core.container import open_delta
from deltacome_core.delta import load_pair
from deltacome_core.entries import ExactEntry, LowRankEntry, UnchangedEntry
from deltacome_core.errors import UserError
from deltacome_core.inspection import inspect_delta
from deltacome_core.models import load_model
from deltacome_core.packed import PackedMatrix, PackedStack
from deltacome_core.reconstruct import reconstruct_checkpoint
from deltacome_core.student import DeltaWeights, TextModel
from deltacome_core.tensors import load_tensor
from deltacome_core.verify import verify_delta

CPU = torch.device("cpu")
PROMPT = torch.tensor([[40, 41, 42, 200, 7, 8, 9]])
# Stored [in, out]: GPT-2's modules and the experts of these classes.
STORED_BY_INPUT = {"gpt2": "transformer.h.", "gpt_oss": ".experts.", "llama4": ".experts."}
names = pytest.mark.parametrize("name", sorted(ARCHITECTURES))


@pytest.fixture
def packed(pack, name):
    return pack(name)


def is_low_rank(name, shape):
    """What docs/architectures.md says, in the test's own words."""
    if "norm" in name or name.endswith("bias") or len(shape) not in {2, 3}:
        return False
    in_vocabulary = any(part in name for part in ("embed_tokens", "lm_head", "wte", "word_embed"))
    return not in_vocabulary and min(shape[-2:]) >= 32


@names
@pytest.mark.parametrize("recipe", ["come", "free"])
def test_every_tensor_is_listed_once_as_what_its_shape_says(packed, name, recipe):
    tuned = open_checkpoint(packed.tuned)
    listed = inspect_delta(packed.folder / recipe, verify_digests=True).manifest.entries
    assert sorted(entry.name for entry in listed) == sorted(tuned.layout)
    assert not any(isinstance(entry, UnchangedEntry) for entry in listed)
    for entry in listed:
        assert (entry.dtype, entry.shape) == tuned.layout[entry.name]
        assert isinstance(entry, LowRankEntry) == is_low_rank(entry.name, entry.shape)
        if len(entry.shape) == 1 or entry.name.endswith("bias"):
            assert isinstance(entry, ExactEntry)


@names
def test_the_layers_of_the_language_model_are_quantised_with_feedback(packed, name):
    wanted = ARCHITECTURES[name]
    assert packed.report.with_feedback == wanted.n_matrices
    assert packed.report.n_matrices == wanted.n_matrices + wanted.others
    free = inspect_delta(packed.folder / "free")
    assert free.manifest.calibration is None
    assert free.n_matrices == packed.report.n_matrices


@names
def test_a_matrix_stored_by_input_is_packed_by_output(packed, name):
    part = STORED_BY_INPUT.get(name)
    for entry in packed.delta.entries.values():
        if isinstance(entry, LowRankEntry):
            flipped = part is not None and part in entry.name
            assert entry.transposed == flipped
            assert len(entry.shape) == 2 or entry.n_slices == EXPERTS
    for entry in open_delta(packed.folder / "free").entries.values():
        assert not getattr(entry, "transposed", False)


def delta_by_hand(packed):
    """The dense delta of any low-rank tensor, from its codes."""
    if isinstance(packed, PackedMatrix):
        return multiply_out(packed)
    assert isinstance(packed, PackedStack)
    deltas = [multiply_out(piece) for piece in packed.slices]
    deltas = torch.stack([delta.T if packed.transposed else delta for delta in deltas])
    return deltas if len(packed.shape) == 3 else deltas[0]


@names
def test_the_rebuilt_checkpoint_is_the_backbone_plus_the_packed_delta(packed, name):
    base, tuned = open_checkpoint(packed.base), open_checkpoint(packed.tuned)
    back = open_checkpoint(packed.folder / "back")
    assert back.layout == tuned.layout
    for tensor, entry in packed.delta.entries.items():
        ours, truth = load_tensor(back, tensor), load_tensor(tuned, tensor)
        if isinstance(entry, LowRankEntry):
            pair = load_pair(base, tuned, tensor)
            by_hand = pair.base.double() + delta_by_hand(packed.delta.load(tensor))
            torch.testing.assert_close(ours.double(), by_hand, rtol=2**-8, atol=1e-6)
            moved = torch.linalg.norm(pair.difference())
            assert torch.linalg.norm(ours.float() - truth.float()) < 0.7 * moved
        elif isinstance(entry, ExactEntry):
            assert torch.equal(ours, truth)


def checkpoint_tensors(model_name, parameter):
    """Where transformers 5 saves a parameter, written out by hand for the classes that rename."""
    if model_name in {"llava", "gemma3"}:
        inner = parameter.removeprefix("model.")
        if inner.startswith("language_model."):
            return ["language_model.model." + inner.removeprefix("language_model.")]
        return ["language_model." + inner if inner.startswith("lm_head") else inner]
    layer, _, leaf = parameter.partition(".mlp.")
    if model_name == "mixtral" and leaf:
        block = f"{layer}.block_sparse_moe"
        experts = [f"{block}.experts.{index}" for index in range(EXPERTS)]
        return {
            "gate.weight": [f"{block}.gate.weight"],
            "experts.gate_up_proj": [
                f"{each}.{w}.weight" for each in experts for w in ("w1", "w3")
            ],
            "experts.down_proj": [f"{each}.w2.weight" for each in experts],
        }[leaf]
    if model_name in {"qwen2_moe", "qwen3_moe"} and leaf.startswith("experts."):
        sites = ("gate", "up") if "gate" in leaf else ("down",)
        experts = [f"{layer}.mlp.experts.{index}" for index in range(EXPERTS)]
        return [f"{each}.{site}_proj.weight" for each in experts for site in sites]
    return [parameter]


@names
def test_the_rebuilt_model_answers_as_the_delta_applied_by_hand(packed, name):
    """The delta is added inside the loaded backbone, past our checkpoint writer and the library."""
    model, delta = load_model(packed.base), packed.delta
    back = open_checkpoint(packed.folder / "back")
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            pieces = []
            for tensor in checkpoint_tensors(name, parameter):
                if isinstance(delta.entries[tensor], LowRankEntry):
                    pieces.append(delta_by_hand(delta.load(tensor)))
                else:
                    base = load_tensor(open_checkpoint(packed.base), tensor)
                    pieces.append(load_tensor(back, tensor).double() - base.double())
            step = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            weight.add_(step.reshape(weight.shape).float())
        rebuilt = load_model(packed.folder / "back")(PROMPT).logits
        ours, tuned = model(PROMPT).logits, load_model(packed.tuned)(PROMPT).logits
        backbone = load_model(packed.base)(PROMPT).logits
    # The rebuilt weights were rounded to bfloat16.
    assert torch.linalg.norm(ours - rebuilt) < 0.02 * torch.linalg.norm(rebuilt)
    assert torch.linalg.norm(rebuilt - tuned) < 0.9 * torch.linalg.norm(backbone - tuned)


@names
def test_the_model_that_recipes_train_answers_as_the_rebuilt_one(packed, name, tmp_path):
    """Whatever of it cannot be trained is there whole."""
    delta = open_delta(packed.folder / "free")
    weights = DeltaWeights(backbone=open_checkpoint(packed.base), delta=delta, device=CPU)
    student = TextModel(
        open_checkpoint(packed.tuned),
        weights,
        held=torch.float32,
        device=CPU,
        saves_memory=True,
    )
    if name == "llama4":
        # Its decoder answers with logits alone, and the recipe leaves the delta as it was.
        with pytest.raises(UserError) as error:
            student.states(PROMPT)
        assert error.value.code == "model_not_runnable"
        return
    for each in student.trainable.values():
        each.use({kind: torch.zeros(shape) for kind, shape in each.numbers.items()})
    reconstruct_checkpoint(packed.base, packed.folder / "free", tmp_path / "f", dtype=torch.float32)
    with torch.no_grad():
        ours = student.logits(student.states(PROMPT)[0])
        theirs = load_model(tmp_path / "f")(PROMPT).logits[0]
    assert student.trainable
    assert torch.linalg.norm(ours - theirs) < 1e-3 * torch.linalg.norm(theirs)


@names
def test_verification_runs_on_text(packed, name, tmp_path):
    found = verify_delta(
        packed.base, packed.tuned, packed.folder / "come",
        reconstructed_dir=packed.folder / "back",
    )  # fmt: skip
    assert 0.4 < found.recovery <= 1
    assert len(found.matrices) == sum(
        not isinstance(entry, ExactEntry) for entry in packed.delta.entries.values()
    )
    assert all(check.ok for check in found.checks if "tensors" in check.name)


def kinds(delta, part):
    return {name: type(entry) for name, entry in delta.entries.items() if name.startswith(part)}


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_a_vision_tower_that_was_frozen_costs_nothing(pack, name, tmp_path):
    base, tuned = architectures.save_pair(tmp_path, ARCHITECTURES[name], same=("vision_tower",))
    report = compress_checkpoint(base, tuned, tmp_path / "delta", COME)
    frozen = open_delta(tmp_path / "delta")
    tower = kinds(frozen, "vision_tower.")
    assert set(tower.values()) == {UnchangedEntry}
    assert not any("vision_tower" in stored for stored in frozen.folder.stored)
    assert report.with_feedback == ARCHITECTURES[name].n_matrices
    assert report.total_bytes < pack(name).report.total_bytes


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_a_vision_tower_and_a_projector_that_changed_follow_the_rules_of_all(pack, name):
    delta = pack(name).delta
    tower = kinds(delta, "vision_tower.")
    assert tower["vision_tower.embeddings.patch_embedding.weight"] is ExactEntry
    assert tower["vision_tower.encoder.layers.1.mlp.fc1.weight"] is LowRankEntry
    assert tower["vision_tower.encoder.layers.1.mlp.fc1.bias"] is ExactEntry
    assert LowRankEntry in kinds(delta, "multi_modal_projector.").values()


def test_experts_published_by_input_are_packed_by_output(tmp_path):
    """Qwen3-VL-MoE's published files have [n, in, out]; the library turns them while loading."""
    base, tuned = architectures.save_pair(tmp_path, ARCHITECTURES["qwen3_vl_moe"])
    for folder in (base, tuned):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        for name, value in tensors.items():
            if ".experts." in name:
                tensors[name] = value.mT.contiguous()
        save_file(tensors, path, {"format": "pt"})
    report = compress_checkpoint(base, tuned, tmp_path / "delta", COME)
    assert report.with_feedback == ARCHITECTURES["qwen3_vl_moe"].n_matrices
    for entry in open_delta(tmp_path / "delta").entries.values():
        if ".experts." in entry.name:
            assert entry.transposed
    assert verify_delta(base, tuned, tmp_path / "delta").recovery > 0.4


def test_a_class_only_the_library_can_read_is_calibrated_where_names_agree(tmp_path):
    """HRM keeps q, k, v and gate, up as one tensor each; it runs its layers again and again."""
    base, tuned = architectures.save_pair(tmp_path, architectures.RECURRENT)
    report = compress_checkpoint(base, tuned, tmp_path / "delta", COME)
    assert (report.with_feedback, report.n_matrices) == (4, 16)
    assert open_delta(tmp_path / "delta").manifest.calibration.n_matrices == 4
    assert verify_delta(base, tuned, tmp_path / "delta").recovery > 0.4


def test_layers_that_lie_deeper_in_the_decoder_are_found(tmp_path):
    base, tuned = architectures.save_pair(tmp_path, architectures.BIDIRECTIONAL)
    report = compress_checkpoint(base, tuned, tmp_path / "delta", COME)
    assert report.with_feedback == architectures.BIDIRECTIONAL.n_matrices


def test_an_expert_that_no_text_reaches_is_counted_as_rounded(tmp_path):
    model = architectures.make_model(ARCHITECTURES["gpt_oss"])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.bias[EXPERTS - 1] = -1000
    base = finetunes.save(model, tmp_path / "base")
    tuned = finetunes.save(architectures.fine_tune(model), tmp_path / "tuned")
    (tuned / "calibration.txt").write_text(finetunes.CALIBRATION)
    report = compress_checkpoint(base, tuned, tmp_path / "delta", COME)
    n_matrices = ARCHITECTURES["gpt_oss"].n_matrices
    assert (report.with_feedback, report.n_matrices) == (n_matrices - 4, n_matrices)


@pytest.mark.parametrize("recipe", [COME, FREE], ids=lambda recipe: recipe.name)
def test_tensors_that_the_backbone_lacks_are_kept_exactly_and_listed(tmp_path, recipe):
    base, tuned = architectures.save_pair(tmp_path, ARCHITECTURES["llama"])
    path = tuned / "model.safetensors"
    unknown = {
        "model.layers.0.adapter.weight": torch.randn(64, 64),
        "model.layers.1.experts.weight": torch.randn(2, 40, 40).to(torch.bfloat16),
        "steps": torch.tensor(7),
        "router.table": torch.arange(96, dtype=torch.int32).view(2, 48),
    }
    save_file(load_file(path) | unknown, path, {"format": "pt"})
    report = compress_checkpoint(base, tuned, tmp_path / "delta", recipe)
    assert report.n_matrices == ARCHITECTURES["llama"].n_matrices
    entries = {entry.name: entry for entry in inspect_delta(tmp_path / "delta").manifest.entries}
    reconstruct_checkpoint(base, tmp_path / "delta", tmp_path / "back")
    back = open_checkpoint(tmp_path / "back")
    for name, values in unknown.items():
        assert isinstance(entries[name], ExactEntry)
        found = load_tensor(back, name)
        assert found.dtype == values.dtype
        assert torch.equal(found, values)


def test_a_model_that_needs_pictures_is_calibrated_but_not_verified(tmp_path):
    chosen = architectures.WITH_PICTURES_ONLY
    base, tuned = architectures.save_pair(tmp_path, chosen)
    report = compress_checkpoint(base, tuned, tmp_path / "delta", COME)
    assert report.with_feedback == chosen.n_matrices
    with pytest.raises(UserError) as caught:
        verify_delta(base, tuned, tmp_path / "delta")
    assert caught.value.code == "model_not_runnable"
    assert "pixel_values" in caught.value.params["reason"]


def test_a_model_that_is_no_language_model_is_compressed_without_data_only(tmp_path):
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**architectures.VISION)
    model = transformers.CLIPVisionModel(config)
    base = finetunes.save(model, tmp_path / "base")
    tuned = finetunes.save(architectures.fine_tune(model), tmp_path / "tuned")
    (tuned / "calibration.txt").write_text(finetunes.CALIBRATION)
    for action in (
        lambda: compress_checkpoint(base, tuned, tmp_path / "come", COME),
        lambda: load_model(tuned),
    ):
        with pytest.raises(UserError) as caught:
            action()
        assert caught.value.code == "architecture_unknown"
    report = compress_checkpoint(base, tuned, tmp_path / "free", FREE)
    assert (report.with_feedback, report.calibration) == (0, None)
    assert report.n_matrices == 13
    reconstruct_checkpoint(base, tmp_path / "free", tmp_path / "back")
    assert open_checkpoint(tmp_path / "back").layout == open_checkpoint(tuned).layout


DOC = (Path(__file__).resolve().parents[2] / "docs" / "architectures.md").read_text()


def test_the_printed_counts_are_those_that_were_asked_for():
    printed = re.findall(r"^\| (\w+)[^|]*\|[^|]+\| (\d+) \| (\d+) \|$", DOC, re.MULTILINE)
    table = {name: (int(calibrated), int(others)) for name, calibrated, others in printed}
    assert table == {
        name: (chosen.n_matrices, chosen.others) for name, chosen in ARCHITECTURES.items()
    }
