"""Each supported class, from what transformers saves to logits of the rebuilt checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, EXPERTS

from deltacome_core.checkpoint import open_checkpoint
from deltacome_core.compress import CompressReport, compress_checkpoint
from deltacome_core.container import open_delta
from deltacome_core.delta import load_pair
from deltacome_core.entries import ExactEntry, LowRankEntry, UnchangedEntry
from deltacome_core.inspection import inspect_delta
from deltacome_core.models import load_model
from deltacome_core.packed import PackedMatrix, PackedStack
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import reconstruct_checkpoint
from deltacome_core.tensors import load_tensor
from deltacome_core.verify import verify_delta

CPU = torch.device("cpu")
COME = get_recipe("come", matrix_bits=4.0)
FREE = get_recipe("datafree", matrix_bits=4.0)
PROMPT = torch.tensor([[40, 41, 42, 200, 7, 8, 9]])
# Stored [in, out]: GPT-2's modules and the experts of these classes.
STORED_BY_INPUT = {"gpt2": "transformer.h.", "gpt_oss": ".experts.", "llama4": ".experts."}
names = pytest.mark.parametrize("name", sorted(ARCHITECTURES))


@dataclass(frozen=True, kw_only=True)
class Packed:
    folder: Path
    report: CompressReport

    @property
    def base(self):
        return self.folder / "base"

    @property
    def tuned(self):
        return self.folder / "tuned"

    @property
    def delta(self):
        return open_delta(self.folder / "come")


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    """Compress the pair of a class once, with calibration and without; read only."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            base, tuned = architectures.save_pair(folder, name)
            report = compress_checkpoint(base, tuned, folder / "come", COME)
            compress_checkpoint(base, tuned, folder / "free", FREE)
            reconstruct_checkpoint(base, folder / "come", folder / "back")
            made[name] = Packed(folder=folder, report=report)
        return made[name]

    return make


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


def multiply_out(matrix):
    total = torch.zeros(matrix.out_features, matrix.in_features, dtype=torch.float64)
    sigma = matrix.sigma.double()
    for band in matrix.bands:
        scaled = band.u.dequantise().double() * sigma[: band.rank]
        total += scaled @ band.v.dequantise().double()
        sigma = sigma[band.rank :]
    return total


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
    if ARCHITECTURES[model_name].config in {"LlavaConfig", "Gemma3Config"}:
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
    if model_name.endswith("_moe") and leaf.startswith("experts."):
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
