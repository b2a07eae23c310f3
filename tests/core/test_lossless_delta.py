"""The lossless recipe from checkpoint to delta and back, bit for bit."""

import json
import shutil

import finetunes
import pytest
import torch
from factories_core import (
    fine_tune,
    llama_tensors,
    rewrite_entry,
    rewrite_manifest,
    write_checkpoint,
)

from deltacome_core.checkpoint import checkpoint_digest, hash_tensors, open_checkpoint
from deltacome_core.compress import compress_checkpoint
from deltacome_core.container import open_delta
from deltacome_core.delta_folder import hash_file
from deltacome_core.entries import CodedEntry, UnchangedEntry
from deltacome_core.errors import UserError
from deltacome_core.inspection import inspect_delta
from deltacome_core.manifest import MANIFEST_NAME, read_manifest
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import reconstruct_checkpoint
from deltacome_core.tensors import load_tensor
from deltacome_core.verify import verify_delta

LOSSLESS = get_recipe("lossless")
EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def compress(folder, base, tuned):
    write_checkpoint(folder / "base", base)
    write_checkpoint(folder / "tuned", tuned)
    return compress_checkpoint(folder / "base", folder / "tuned", folder / "delta", LOSSLESS)


def hashes(folder):
    checkpoint = open_checkpoint(folder)
    return checkpoint.layout, hash_tensors(checkpoint)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("lossless")
    base = llama_tensors(0, hidden=64)
    tuned = fine_tune(base, 1, new_rows=3)
    tuned["counts"] = torch.arange(20)
    compress(root, base, tuned)
    return root


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")])  # fmt: skip
def test_every_tensor_comes_back_with_the_same_sha256(tmp_path, dtypes):
    old, new = (getattr(torch, name) for name in dtypes)
    base = {name: tensor.to(old) for name, tensor in llama_tensors(0).items()}
    tuned = {name: tensor.to(new) for name, tensor in fine_tune(base, 1, new_rows=3).items()}
    compress(tmp_path, base, tuned)
    reconstruct_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "tuned")


def test_the_digest_of_the_manifest_is_that_of_the_result(folders, tmp_path):
    reconstruct_checkpoint(folders / "base", folders / "delta", tmp_path / "out")
    manifest = read_manifest(folders / "delta")
    assert checkpoint_digest(*hashes(tmp_path / "out")) == manifest.fine_tune.digest


def test_what_did_not_change_costs_nothing_and_new_tensors_need_no_backbone(folders):
    entries = open_delta(folders / "delta").entries
    assert isinstance(entries[NORM], UnchangedEntry)
    assert entries["counts"].base_rows == 0
    assert (entries[EMBED].base_rows, entries[EMBED].shape) == (40, (43, 64))
    assert "counts" not in read_manifest(folders / "delta").backbone.tensors


def test_a_copy_in_a_wider_type_costs_nothing_but_a_changed_sign_of_zero_is_kept(tmp_path):
    base = llama_tensors(0)
    base[NORM][0] = 0.0
    tuned = {name: tensor.float() for name, tensor in base.items()}
    tuned[NORM] = tuned[NORM].clone()
    tuned[NORM][0] = -0.0
    compress(tmp_path, base, tuned)
    entries = open_delta(tmp_path / "delta").entries
    coded = [name for name, entry in entries.items() if isinstance(entry, CodedEntry)]
    assert coded == [NORM]
    reconstruct_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "tuned")


def test_the_same_pair_gives_the_same_bytes(folders, tmp_path):
    compress_checkpoint(folders / "base", folders / "tuned", tmp_path / "again", LOSSLESS)
    for name in ("delta.json", "delta.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folders / "delta" / name).read_bytes()


def test_every_byte_is_accounted_for(folders):
    report = inspect_delta(folders / "delta")
    files = sum((folders / "delta" / n).stat().st_size for n in ("delta.json", "delta.safetensors"))
    assert report.total_bytes == report.sizes.total_bytes == files
    entries = open_delta(folders / "delta").entries.values()
    sizes = [entry.size_bytes for entry in entries if isinstance(entry, CodedEntry)]
    assert report.to_json()["bytes"]["coded"] == sum(sizes) > 0
    assert report.entries_by_kind == {"coded": len(sizes), "unchanged": 1}
    assert json.loads((folders / "delta" / "delta.json").read_text())["tools"]["zstd"]


def test_a_tensor_can_be_had_in_another_type(folders, tmp_path):
    reconstruct_checkpoint(
        folders / "base", folders / "delta", tmp_path / "out", dtype=torch.float32
    )
    ours, truth = open_checkpoint(tmp_path / "out"), open_checkpoint(folders / "tuned")
    assert torch.equal(load_tensor(ours, QUERY), load_tensor(truth, QUERY).float())
    assert load_tensor(ours, "counts").dtype == torch.int64


def test_verification_finds_nothing_lost(tmp_path):
    base, tuned = finetunes.save_pair(tmp_path, dtype=torch.bfloat16)
    compress_checkpoint(base, tuned, tmp_path / "delta", LOSSLESS)
    report = verify_delta(base, tuned, tmp_path / "delta")
    assert (report.grade, report.kl, report.top1, report.greedy_exact) == ("A", 0.0, 1.0, 1.0)
    assert report.matrices == ()
    assert all(check.ok for check in report.checks)


def refuse(folders, delta, out):
    with pytest.raises(UserError) as caught:
        reconstruct_checkpoint(folders / "base", delta, out)
    assert not out.exists()
    return caught.value


@pytest.fixture
def copy(folders, tmp_path):
    return shutil.copytree(folders / "delta", tmp_path / "delta")


def test_a_coded_tensor_with_another_sha256_is_refused(folders, copy, tmp_path):
    rewrite_entry(copy, QUERY, sha256="0" * 64)
    error = refuse(folders, copy, tmp_path / "out")
    assert error.code == "delta_invalid"
    assert QUERY in str(error)


def test_a_changed_coded_byte_is_refused_even_when_the_file_digest_fits(folders, copy, tmp_path):
    data = copy / "delta.safetensors"
    raw = bytearray(data.read_bytes())
    raw[-40] ^= 1
    data.write_bytes(raw)
    assert refuse(folders, copy, tmp_path / "out").code == "file_digest_mismatch"
    files = dict(read_manifest(copy).files)
    rewrite_manifest(copy, files=files | {data.name: hash_file(data)})
    assert refuse(folders, copy, tmp_path / "out").code == "delta_invalid"


def test_another_announced_size_is_refused(folders, copy, tmp_path):
    size = open_delta(copy).entries[QUERY].size_bytes
    rewrite_entry(copy, QUERY, size_bytes=size + 1)
    error = refuse(folders, copy, tmp_path / "out")
    assert error.code == "delta_invalid"
    assert f"coded.{QUERY}" in str(error)


def test_another_backbone_is_refused(folders, copy, tmp_path):
    other = llama_tensors(5, hidden=64)
    write_checkpoint(tmp_path / "other", other)
    with pytest.raises(UserError) as caught:
        reconstruct_checkpoint(tmp_path / "other", copy, tmp_path / "out")
    assert caught.value.code == "backbone_digest_mismatch"


@pytest.mark.parametrize(
    "changed",
    [
        {"base_rows": 65},
        {"base_rows": -1},
        {"size_bytes": -1},
        {"sha256": "x"},
        {"shape": [2**31, 1]},
        {"shape": [1] * 9},
    ],
)
def test_a_coded_entry_no_writer_makes_is_refused(copy, changed):
    document = json.loads((copy / MANIFEST_NAME).read_text())
    entry = next(entry for entry in document["entries"] if entry["name"] == QUERY)
    entry |= changed
    (copy / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(UserError) as caught:
        open_delta(copy)
    assert caught.value.code == "delta_invalid"


def test_a_coded_entry_that_needs_the_backbone_names_its_hash(copy):
    backbone = read_manifest(copy).backbone
    del backbone.tensors[QUERY]
    rewrite_manifest(copy, backbone=backbone)
    with pytest.raises(UserError, match="no hash of its backbone tensor"):
        open_delta(copy)
