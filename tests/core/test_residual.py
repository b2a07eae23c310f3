"""A lossy delta and its residual together are the fine-tune, and no other pair is accepted."""

import json
import shutil

import pytest
import torch
from factories_core import fine_tune, llama_tensors, make_delta, rewrite_manifest, write_checkpoint

from deltacome_core import cli, strict_json
from deltacome_core.checkpoint import hash_tensors, open_checkpoint
from deltacome_core.container import open_delta
from deltacome_core.errors import UserError
from deltacome_core.manifest import read_manifest
from deltacome_core.reconstruct import reconstruct_checkpoint
from deltacome_core.residual import HEAD_TENSOR, open_residual
from deltacome_core.residual_writer import write_residual
from deltacome_core.safetensors_file import read_header, write_safetensors

EMBED = "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("residual")
    base = llama_tensors(0)
    tuned = fine_tune(base, 1, new_rows=3)
    write_checkpoint(root / "base", base)
    write_checkpoint(root / "tuned", tuned)
    make_delta(root / "base", root / "tuned", root / "delta")
    write_residual(root / "base", root / "tuned", root / "delta", root / "r.safetensors")
    return root


def hashes(folder):
    checkpoint = open_checkpoint(folder)
    return checkpoint.layout, hash_tensors(checkpoint)


def rebuild(folders, out, *, residual="r.safetensors", **options):
    return reconstruct_checkpoint(
        folders / "base", folders / "delta", out, residual=folders / residual, **options
    )


def test_delta_and_residual_give_the_fine_tune_bit_for_bit(folders, tmp_path):
    reconstruct_checkpoint(folders / "base", folders / "delta", tmp_path / "lossy")
    assert hashes(tmp_path / "lossy") != hashes(folders / "tuned")
    rebuild(folders, tmp_path / "exact")
    assert hashes(tmp_path / "exact") == hashes(folders / "tuned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_type_of_checkpoint_is_restored(tmp_path, dtype):
    base = llama_tensors(0)
    tuned = {name: tensor.to(dtype) for name, tensor in fine_tune(base, 1).items()}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", tuned)
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta")
    pair = tmp_path / "base", tmp_path / "tuned"
    write_residual(*pair, tmp_path / "delta", tmp_path / "r.safetensors")
    rebuild(tmp_path, tmp_path / "exact")
    assert hashes(tmp_path / "exact") == hashes(tmp_path / "tuned")


def test_what_the_delta_restores_exactly_takes_no_bytes(folders):
    entries = open_residual(folders / "r.safetensors", open_delta(folders / "delta")).entries
    assert QUERY in entries
    assert "model.norm.weight" not in entries
    assert "model.layers.0.input_layernorm.weight" not in entries


def test_the_same_residual_is_written_twice(folders, tmp_path):
    pair = folders / "base", folders / "tuned", folders / "delta"
    report = write_residual(*pair, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (folders / "r.safetensors").read_bytes()
    assert report.size_bytes == (tmp_path / "again.safetensors").stat().st_size
    assert report.n_coded + report.n_exact == len(open_delta(folders / "delta").names)


def test_the_result_may_be_cast_once_it_is_exact(folders, tmp_path):
    rebuild(folders, tmp_path / "wide", dtype=torch.float32)
    assert open_checkpoint(tmp_path / "wide").dtype == "F32"


def refuse(folders, out, **options):
    with pytest.raises(UserError) as caught:
        rebuild(folders, out, **options)
    assert not out.exists()
    return caught.value


@pytest.fixture
def copy(folders, tmp_path):
    return shutil.copytree(folders, tmp_path / "copy")


def test_the_residual_of_another_delta_is_refused(copy, tmp_path):
    manifest = read_manifest(copy / "delta")
    rewrite_manifest(copy / "delta", tools=manifest.tools | {"torch": "another"})
    error = refuse(copy, tmp_path / "out")
    assert error.code == "residual_mismatch"
    assert "r.safetensors" in str(error)


def test_another_fine_tune_is_refused(folders, tmp_path):
    other = write_checkpoint(tmp_path / "other", fine_tune(llama_tensors(0), 9, new_rows=3))
    with pytest.raises(UserError) as caught:
        write_residual(folders / "base", other, folders / "delta", tmp_path / "r.safetensors")
    assert caught.value.code == "fine_tune_mismatch"
    assert not (tmp_path / "r.safetensors").exists()


def test_an_existing_file_is_not_overwritten(folders):
    pair = folders / "base", folders / "tuned", folders / "delta"
    with pytest.raises(UserError) as caught:
        write_residual(*pair, folders / "r.safetensors")
    assert caught.value.code == "output_exists"


def test_nothing_is_left_of_a_residual_that_could_not_be_written(folders, tmp_path):
    other = write_checkpoint(tmp_path / "other", llama_tensors(4))
    with pytest.raises(UserError):
        write_residual(other, folders / "tuned", folders / "delta", tmp_path / "r.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def read_residual(path):
    header, raw = read_header(path), path.read_bytes()[read_header(path).data_start :]
    tensors = {info.name: raw[info.start : info.end] for info in header.tensors}
    return strict_json.loads(tensors.pop(HEAD_TENSOR)), tensors


def write_again(path, head, tensors):
    path.unlink()
    listed = json.dumps(head).encode()
    sources = [(HEAD_TENSOR, "U8", (len(listed),), listed)]
    sources += [(name, "U8", (len(raw),), raw) for name, raw in tensors.items()]
    write_safetensors(path, sources, {})


def test_a_residual_that_lacks_a_tensor_is_refused(copy, tmp_path):
    head, tensors = read_residual(copy / "r.safetensors")
    del tensors[f"coded.{QUERY}"]
    write_again(copy / "r.safetensors", head, tensors)
    assert refuse(copy, tmp_path / "out").code == "delta_invalid"
    head["entries"] = [entry for entry in head["entries"] if entry["name"] != QUERY]
    write_again(copy / "r.safetensors", head, tensors)
    error = refuse(copy, tmp_path / "out")
    assert error.code == "delta_invalid"
    assert "do not give the fine-tune" in str(error)


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "ghost"},
        {"dtype": "F16"},
        {"shape": [48, 47]},
        {"base_rows": 47},
        {"sha256": "0" * 64},
        {"kind": "exact"},
    ],
)
def test_an_entry_that_does_not_fit_the_delta_is_refused(copy, tmp_path, changed):
    head, tensors = read_residual(copy / "r.safetensors")
    entry = next(entry for entry in head["entries"] if entry["name"] == QUERY)
    entry |= changed
    write_again(copy / "r.safetensors", head, tensors)
    assert refuse(copy, tmp_path / "out").code == "delta_invalid"


def test_a_file_that_is_no_residual_is_refused(copy, tmp_path):
    path = copy / "r.safetensors"
    shutil.copyfile(copy / "delta" / "delta.safetensors", path)
    assert refuse(copy, tmp_path / "out").code == "delta_invalid"
    path.write_bytes(b"no")
    assert refuse(copy, tmp_path / "out").code == "delta_invalid"
    path.unlink()
    assert refuse(copy, tmp_path / "out").code == "file_missing"


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"format": "deltacome"}, "delta_invalid"),
        ({"format_version": 2}, "delta_version_unsupported"),
        ({"more": 1}, "delta_invalid"),
        ({"tools": {"zstd": 1}}, "delta_invalid"),
    ],
)
def test_a_head_no_writer_makes_is_refused(copy, tmp_path, changed, code):
    head, tensors = read_residual(copy / "r.safetensors")
    write_again(copy / "r.safetensors", head | changed, tensors)
    assert refuse(copy, tmp_path / "out").code == code


def test_a_head_that_is_not_json_is_refused(copy, tmp_path):
    (copy / "r.safetensors").unlink()
    write_safetensors(copy / "r.safetensors", [(HEAD_TENSOR, "U8", (1,), b"{")], {})
    assert refuse(copy, tmp_path / "out").code == "delta_invalid"


def test_a_truncated_residual_is_refused(copy, tmp_path):
    path = copy / "r.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert refuse(copy, tmp_path / "out").code == "delta_invalid"


def test_the_command_writes_a_residual_and_rebuilds_with_it(folders, tmp_path, capfd):
    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        return end.value.code, capfd.readouterr().out

    pair = ["--base", folders / "base", "--delta", folders / "delta"]
    file = tmp_path / "new" / "r.safetensors"
    code, out = run("residual", *pair, "--tuned", folders / "tuned", "--out", file, "--json")
    assert code == 0
    assert json.loads(out)["size_bytes"] == file.stat().st_size
    code, _ = run("reconstruct", *pair, "--out", tmp_path / "exact", "--residual", file)
    assert code == 0
    assert hashes(tmp_path / "exact") == hashes(folders / "tuned")
    shutil.copytree(folders / "delta", tmp_path / "other")
    tools = read_manifest(tmp_path / "other").tools
    rewrite_manifest(tmp_path / "other", tools=tools | {"torch": "another"})
    pair[-1] = tmp_path / "other"
    code, out = run("reconstruct", *pair, "--out", tmp_path / "no", "--residual", file, "--json")
    assert code == cli.EXIT_INCOMPATIBLE
    assert json.loads(out)["error"]["code"] == "residual_mismatch"
