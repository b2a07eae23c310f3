"""Deltas against a backbone that is served with fewer bits."""

import json
import math

import architectures
import finetunes
import numpy as np
import pytest
import torch
from factories_core import write_checkpoint

from deltacome_core.checkpoint import at_precision, hash_tensors, open_checkpoint
from deltacome_core.cli import main
from deltacome_core.compress import compress_checkpoint
from deltacome_core.container import open_delta
from deltacome_core.entries import LowRankEntry, UnchangedEntry
from deltacome_core.errors import InternalError, UserError
from deltacome_core.evaluate import evaluate_subjects
from deltacome_core.lossless import read_elements
from deltacome_core.manifest import manifest_to_json, parse_manifest, read_manifest
from deltacome_core.precision import NATIVE, SCHEMES, plan_precision
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import apply_entry, rebuild_tensor, reconstruct_checkpoint
from deltacome_core.residual_writer import write_residual
from deltacome_core.rounding import round_values
from deltacome_core.served import served_backbone, write_served
from deltacome_core.tensors import load_tensor
from deltacome_core.verify import compare_weights, verify_delta

FREE = get_recipe("datafree", matrix_bits=4.0)
SITE = "model.layers.1.mlp.up_proj.weight"
schemes = pytest.mark.parametrize("scheme", sorted(SCHEMES))


def round_by_hand(values, scheme):
    """The page's rule, one group at a time, in numpy's float32."""
    rows = values.reshape(-1, values.shape[-1])
    out = np.empty_like(rows)

    def stored(scale):
        return np.float32(torch.tensor(float(scale)).to(torch.bfloat16).float())

    for row, line in zip(out, rows, strict=True):
        width = {"int8": len(line), "int4": 128}[scheme]
        for start in range(0, len(line), width):
            part = line[start : start + width]
            if scheme == "int8":
                scale = stored(np.abs(part).max() / np.float32(127))
                codes = np.clip(np.rint(part / (scale or np.float32(1))), -127, 127)
                row[start : start + width] = codes * scale
            else:
                low, high = min(part.min(), np.float32(0)), max(part.max(), np.float32(0))
                scale = stored((high - low) / np.float32(15))
                zero = np.clip(np.rint(-low / (scale or np.float32(1))), 0, 15)
                codes = np.clip(np.rint(part / (scale or np.float32(1))) + zero, 0, 15)
                row[start : start + width] = (codes - zero) * scale
    return torch.from_numpy(out.reshape(values.shape)).to(torch.bfloat16)


@schemes
@pytest.mark.parametrize("shape", [(3, 5), (4, 128), (5, 300), (2, 3, 130)])
def test_values_are_rounded_as_the_page_says(scheme, shape):
    torch.manual_seed(math.prod(shape))
    values = torch.randn(shape).mul(0.02).to(torch.bfloat16)
    values[0, 0] = 0
    values[-1, -1] = values[-1, -1].abs()
    expected = round_by_hand(values.float().numpy(), scheme)
    assert torch.equal(round_values(values, SCHEMES[scheme]), expected)


@schemes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_keeps_the_dtype_and_has_the_error_of_its_bits(scheme, dtype):
    torch.manual_seed(0)
    values = torch.randn(64, 1024).to(dtype)
    rounded = round_values(values, SCHEMES[scheme])
    assert rounded.dtype == dtype
    error = (rounded.float() - values.float()).norm() / values.float().norm()
    low, high = {"int8": (0.005, 0.012), "int4": (0.08, 0.12)}[scheme]
    assert low < float(error) < high


@schemes
def test_a_group_of_zeros_and_a_group_of_one_sign_are_rounded(scheme):
    values = torch.zeros(2, 256)
    values[1, 128:] = 3.0
    assert torch.equal(round_values(values, SCHEMES[scheme]), values)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A bf16 pair of which two matrices of layer 1 were left alone; read only."""
    folder = tmp_path_factory.mktemp("pair")
    model = finetunes.make_model()
    base = finetunes.save(model, folder / "base", dtype=torch.bfloat16)
    moved = finetunes.perturb(model.float(), size=0.002)
    kept = load_tensor(open_checkpoint(base), SITE)
    with torch.no_grad():
        moved.model.layers[1].mlp.up_proj.weight.copy_(kept)
    tuned = finetunes.save(moved, folder / "tuned", dtype=torch.bfloat16)
    (tuned / "calibration.txt").write_text(finetunes.CALIBRATION)
    finetunes.write_items(tuned / "evaluation.jsonl")
    return base, tuned


@pytest.fixture(scope="module")
def folded(pair, tmp_path_factory):
    """Deltas of the pair by precision of the backbone; read only."""
    folder = tmp_path_factory.mktemp("folded")
    for name in (NATIVE, *SCHEMES):
        compress_checkpoint(*pair, folder / name, FREE, backbone_precision=name)
    return folder


def served(pair, scheme):
    base = open_checkpoint(pair[0])
    return at_precision(base, plan_precision(scheme, base.layout))


def test_a_delta_of_the_native_backbone_says_nothing_new(pair, folded, tmp_path):
    assert read_manifest(folded / NATIVE).backbone.precision is None
    document = json.loads((folded / NATIVE / "delta.json").read_bytes())
    assert set(document["backbone"]) == {"digest", "tensors"}
    compress_checkpoint(*pair, tmp_path / "plain", FREE)
    for file in (folded / NATIVE).iterdir():
        assert (tmp_path / "plain" / file.name).read_bytes() == file.read_bytes()


@schemes
def test_the_manifest_names_scheme_and_rounded_tensors_and_keeps_the_stored_hashes(
    pair, folded, scheme
):
    raw = (folded / scheme / "delta.json").read_bytes()
    record = parse_manifest(raw).backbone
    base = open_checkpoint(pair[0])
    assert record.precision.scheme == scheme
    assert record.precision.tensors == {name for name in base.tensors if "_proj" in name}
    assert record.digest == read_manifest(folded / NATIVE).backbone.digest
    assert record.tensors.items() <= hash_tensors(base).items()
    assert manifest_to_json(parse_manifest(raw)) == raw


@schemes
def test_a_matrix_that_the_fine_tune_left_alone_is_corrected_too(pair, folded, scheme):
    assert isinstance(open_delta(folded / NATIVE).entry(SITE), UnchangedEntry)
    delta = open_delta(folded / scheme)
    assert isinstance(delta.entry(SITE), LowRankEntry)
    truth = load_tensor(open_checkpoint(pair[1]), SITE).float()
    before = load_tensor(served(pair, scheme), SITE).float()
    after = rebuild_tensor(open_checkpoint(pair[0]), delta, SITE).float()
    assert (after - truth).norm() < 0.7 * (before - truth).norm()


@schemes
def test_a_folded_delta_is_nearer_to_the_fine_tune_than_an_uncorrected_one(pair, folded, scheme):
    base, tuned = open_checkpoint(pair[0]), open_checkpoint(pair[1])
    native, delta = open_delta(folded / NATIVE), open_delta(folded / scheme)
    for name in delta.manifest.backbone.precision.tensors:
        truth = load_tensor(tuned, name).float()
        rounded = load_tensor(served(pair, scheme), name)
        uncorrected = apply_entry(rounded, native.load(name)).float()
        ours = rebuild_tensor(base, delta, name).float()
        assert (ours - truth).norm() < (uncorrected - truth).norm()


@schemes
def test_every_reader_adds_to_the_served_backbone(pair, folded, scheme, tmp_path):
    base, tuned = pair
    delta = open_delta(folded / scheme)
    reconstruct_checkpoint(base, folded / scheme, tmp_path / "back")
    back = open_checkpoint(tmp_path / "back")
    for name in delta.names:
        expected = apply_entry(load_tensor(served(pair, scheme), name), delta.load(name))
        assert torch.equal(load_tensor(back, name), expected)
    weights = compare_weights(base, tuned, folded / scheme, tmp_path / "back")
    errors = {each.name: each.relative_error for each in weights.errors}
    truth, before = (
        load_tensor(open_checkpoint(tuned), SITE),
        load_tensor(served(pair, scheme), SITE),
    )
    missed = (load_tensor(back, SITE).float() - truth.float()).norm()
    moved = (truth.float() - before.float()).norm()
    assert errors[SITE] == pytest.approx(float(missed / moved))
    write_residual(base, tuned, folded / scheme, tmp_path / "residual.safetensors")
    reconstruct_checkpoint(
        base, folded / scheme, tmp_path / "exact", residual=tmp_path / "residual.safetensors"
    )
    assert hash_tensors(open_checkpoint(tmp_path / "exact")) == hash_tensors(open_checkpoint(tuned))


def test_verification_and_evaluation_judge_the_backbone_as_it_is_served(pair, folded, tmp_path):
    base, tuned = pair
    report = verify_delta(base, tuned, folded / "int4")
    stored = verify_delta(base, tuned, folded / NATIVE)
    with served_backbone(base, folded / "int4") as plain:
        as_stored = compress_checkpoint(plain, tuned, tmp_path / "plain", FREE)
        assert as_stored.total_bytes
        same = verify_delta(plain, tuned, tmp_path / "plain")
    assert not plain.exists()
    assert report.kl_backbone == pytest.approx(same.kl_backbone, rel=1e-9)
    assert report.kl == pytest.approx(same.kl, rel=1e-9)
    assert report.kl_backbone != pytest.approx(stored.kl_backbone, rel=1e-3)
    found = evaluate_subjects(
        tuned / "evaluation.jsonl", base_dir=base, delta_dir=folded / "int4", max_new_tokens=2
    )
    assert found["backbone"]["n"] == found["delta"]["n"] == len(finetunes.ITEMS)
    left = {path.name for path in folded.iterdir()}
    assert left == {NATIVE, *SCHEMES}


@schemes
def test_served_values_as_a_checkpoint_are_those_that_deltas_are_made_for(pair, scheme, tmp_path):
    view = served(pair, scheme)
    write_served(view, tmp_path / "plain")
    plain = open_checkpoint(tmp_path / "plain")
    assert plain.layout == view.layout
    for name in view.tensors:
        assert torch.equal(load_tensor(plain, name), load_tensor(view, name))
        stored = load_tensor(open_checkpoint(pair[0]), name)
        assert torch.equal(load_tensor(plain, name), stored) != view.is_rounded(name)


def test_an_equal_fine_tune_of_a_rounded_backbone_is_its_correction(pair, tmp_path):
    base, _ = pair
    report = compress_checkpoint(base, base, tmp_path / "d", FREE, backbone_precision="int4")
    assert report.entries["lowrank"] == 14
    assert report.entries["unchanged"] == len(open_checkpoint(base).tensors) - 14


def test_calibration_corrects_every_matrix_of_a_rounded_backbone(pair, tmp_path):
    recipe = get_recipe("come", matrix_bits=4.0)
    report = compress_checkpoint(*pair, tmp_path / "d", recipe, backbone_precision="int8")
    assert report.with_feedback == report.n_matrices == 14


@pytest.mark.parametrize(
    ("name", "rounded", "native"),
    [
        ("llava", "language_model.", ("vision", "projector")),
        ("mixtral", "experts.", ("gate.weight",)),
        ("gpt2", "transformer.h.", ("wte", "wpe")),
    ],
)
def test_only_matrices_of_the_decoder_are_rounded(name, rounded, native, tmp_path):
    model = architectures.make_model(architectures.ARCHITECTURES[name])
    layout = open_checkpoint(finetunes.save(model, tmp_path / "m")).layout
    chosen = plan_precision("int4", layout).tensors
    assert any(rounded in tensor for tensor in chosen)
    for tensor, (_, shape) in layout.items():
        if any(part in tensor for part in native) or len(shape) < 2:
            assert tensor not in chosen


def test_precisions_that_make_no_sense_are_refused(pair, tmp_path):
    def refused(recipe, precision, base=pair[0]):
        with pytest.raises(UserError) as caught:
            compress_checkpoint(base, pair[1], tmp_path / "x", recipe, backbone_precision=precision)
        return caught.value.code

    assert refused(FREE, "int3") == "precision_unknown"
    assert refused(get_recipe("lossless"), "int8") == "precision_unusable"
    flat = write_checkpoint(tmp_path / "flat", {"embed.weight": torch.ones(40, 40)})
    with pytest.raises(UserError) as caught:
        plan_precision("int8", open_checkpoint(flat).layout)
    assert caught.value.code == "precision_unusable"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"scheme": "int2"}, "precision_unknown"),
        ({"tensors": [SITE, SITE]}, "delta_invalid"),
        ({"tensors": ["model.norm.weight"]}, "delta_invalid"),
        ({"tensors": ["../x"]}, "name_unsafe"),
        ({"tensors": [7]}, "delta_invalid"),
        ({"more": 1}, "delta_invalid"),
    ],
)
def test_a_damaged_record_of_the_precision_is_refused(folded, change, code):
    document = json.loads((folded / "int4" / "delta.json").read_bytes())
    document["backbone"]["precision"] |= change
    with pytest.raises(UserError) as caught:
        parse_manifest(json.dumps(document).encode())
    assert caught.value.code == code


def test_coded_tensors_and_rounded_backbones_exclude_each_other(pair, tmp_path):
    compress_checkpoint(*pair, tmp_path / "exact", get_recipe("lossless"))
    document = json.loads((tmp_path / "exact" / "delta.json").read_bytes())
    document["backbone"]["precision"] = {"scheme": "int8", "tensors": [SITE]}
    with pytest.raises(UserError) as caught:
        parse_manifest(json.dumps(document).encode())
    assert caught.value.code == "delta_invalid"
    with pytest.raises(InternalError):
        read_elements(served(pair, "int8"), SITE)


def test_a_run_is_resumed_only_at_the_same_precision(pair, tmp_path):
    class StoppedError(Exception):
        pass

    def stop(done):
        if done.index == 1:
            raise StoppedError

    with pytest.raises(StoppedError):
        compress_checkpoint(*pair, tmp_path / "d", FREE, on_layer=stop)
    report = compress_checkpoint(*pair, tmp_path / "d", FREE, backbone_precision="int8")
    assert report.resumed_layers == 0


def test_the_command_line_takes_and_shows_the_precision(pair, tmp_path, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            main([*map(str, arguments), "--json"])
        assert left.value.code == 0
        return json.loads(capsys.readouterr().out)

    run(
        "compress", "--base", pair[0], "--tuned", pair[1], "--out", tmp_path / "d",
        "--recipe", "datafree", "--backbone-precision", "int8",
    )  # fmt: skip
    assert run("inspect", tmp_path / "d")["backbone_precision"] == "int8"
    run("reconstruct", "--base", pair[0], "--delta", tmp_path / "d", "--out", tmp_path / "back")
