import hashlib
import json

import pytest
import torch
from factories_core import llama_tensors, write_checkpoint

from deltacome_core.checkpoint import (
    checkpoint_digest,
    find_sidecars,
    hash_tensor,
    hash_tensors,
    is_sidecar,
    is_vocabulary_tensor,
    open_checkpoint,
)
from deltacome_core.errors import UserError
from deltacome_core.fit import compare_layout
from deltacome_core.tensors import load_tensor, tensor_bytes


@pytest.fixture
def weights():
    return llama_tensors(0)


def code_of(folder):
    with pytest.raises(UserError) as caught:
        open_checkpoint(folder)
    return caught.value.code


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_is_opened_and_its_tensors_read(tmp_path, weights, shards):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", weights, shards=shards))
    assert checkpoint.tensors.keys() == weights.keys()
    assert checkpoint.n_params == sum(tensor.numel() for tensor in weights.values())
    assert checkpoint.dtype == "BF16"
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert len(checkpoint.files) == shards
    assert checkpoint.size_bytes == sum(path.stat().st_size for path in checkpoint.files)
    assert [path.name for path in checkpoint.sidecars] == ["config.json", "tokenizer.json"]
    for name, tensor in weights.items():
        assert torch.equal(load_tensor(checkpoint, name), tensor)


def test_the_digest_does_not_depend_on_the_shards(tmp_path, weights):
    digests = set()
    for shards in (1, 2, 4):
        checkpoint = open_checkpoint(
            write_checkpoint(tmp_path / str(shards), weights, shards=shards)
        )
        digests.add(checkpoint_digest(checkpoint.layout, hash_tensors(checkpoint)))
    assert len(digests) == 1


def test_the_digest_changes_with_one_bit(tmp_path, weights):
    before = open_checkpoint(write_checkpoint(tmp_path / "a", weights))
    weights["model.norm.weight"].view(torch.int16)[5] ^= 1
    after = open_checkpoint(write_checkpoint(tmp_path / "b", weights))
    digests = [checkpoint_digest(at.layout, hash_tensors(at)) for at in (before, after)]
    assert digests[0] != digests[1]


def test_a_tensor_hash_is_that_of_its_bytes(tmp_path, weights):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", weights, shards=2))
    name = "model.norm.weight"
    expected = hashlib.sha256(tensor_bytes(weights[name])).hexdigest()
    assert hash_tensor(checkpoint, name) == expected
    assert hash_tensors(checkpoint, [name]) == {name: expected}


def test_every_dtype_is_loaded_as_it_is(tmp_path):
    tensors = {
        "f64": torch.tensor([1.5], dtype=torch.float64),
        "f16": torch.tensor([[1.5, -2]], dtype=torch.float16),
        "f8": torch.tensor([1.5, 2], dtype=torch.float8_e4m3fn),
        "i64": torch.tensor([-1, 2**40]),
        "u16": torch.tensor([65535], dtype=torch.uint16),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty((0, 4)),
    }
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", tensors))
    for name, tensor in tensors.items():
        loaded = load_tensor(checkpoint, name)
        assert loaded.dtype == tensor.dtype
        assert loaded.shape == tensor.shape
        assert tensor_bytes(loaded) == tensor_bytes(tensor)


def test_an_absent_tensor_is_named(tmp_path, weights):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", weights))
    with pytest.raises(UserError, match=r"model\.head"):
        load_tensor(checkpoint, "model.head")


def test_a_file_cut_after_opening_is_noticed(tmp_path, weights):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", weights))
    file = checkpoint.files[0]
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 4000)
    last = max(checkpoint.tensors.values(), key=lambda at: at.start).info.name
    for read in (load_tensor, hash_tensor):
        with pytest.raises(UserError) as caught:
            read(checkpoint, last)
        assert caught.value.code == "file_truncated"


def test_a_missing_shard_is_named(tmp_path, weights):
    folder = write_checkpoint(tmp_path / "m", weights, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003") as caught:
        open_checkpoint(folder)
    assert caught.value.code == "shard_missing"


def change_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


NAME = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda index: index.pop("weight_map"), "index_invalid"),
        (lambda index: index.update(weight_map=[]), "index_invalid"),
        (lambda index: index["weight_map"].pop(NAME), "index_invalid"),
        (lambda index: index["weight_map"].update({NAME: 3}), "index_invalid"),
        (lambda index: index["weight_map"].update({NAME: "../x.safetensors"}), "index_invalid"),
        (lambda index: index["weight_map"].update({NAME: "/etc/passwd"}), "index_invalid"),
        (lambda index: index["weight_map"].update({NAME: "model.bin"}), "index_invalid"),
        (
            lambda index: index["weight_map"].update({"ghost": "model-00001-of-00002.safetensors"}),
            "tensor_missing",
        ),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, weights, change, code):
    folder = write_checkpoint(tmp_path / "m", weights, shards=2)
    change_index(folder, change)
    assert code_of(folder) == code


def test_an_index_that_swaps_shards_is_refused(tmp_path, weights):
    folder = write_checkpoint(tmp_path / "m", weights, shards=2)

    def swap(index):
        files = index["weight_map"]
        other = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
        files[NAME] = (other - {files[NAME]}).pop()

    change_index(folder, swap)
    assert code_of(folder) == "index_invalid"


def test_a_tensor_in_two_shards_is_refused(tmp_path, weights):
    folder = write_checkpoint(tmp_path / "m", weights, shards=2)
    first = (folder / "model-00001-of-00002.safetensors").read_bytes()
    (folder / "model-00002-of-00002.safetensors").write_bytes(first)
    assert code_of(folder) == "duplicate_tensor"


def test_shards_beside_a_whole_file_are_ambiguous(tmp_path, weights):
    folder = write_checkpoint(tmp_path / "m", weights, shards=2)
    (folder / "model.safetensors").write_bytes(b"")
    assert code_of(folder) == "index_invalid"


def test_pickled_weights_alone_are_refused(tmp_path, weights):
    folder = write_checkpoint(tmp_path / "m", weights)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert code_of(folder) == "not_safetensors"


def test_folders_that_are_no_checkpoints_are_refused(tmp_path, weights):
    assert code_of(tmp_path / "absent") == "not_a_checkpoint"
    folder = write_checkpoint(tmp_path / "m", weights)
    (folder / "model.safetensors").unlink()
    assert code_of(folder) == "not_a_checkpoint"
    (folder / "config.json").unlink()
    assert code_of(folder) == "not_a_checkpoint"


@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"text_config": {"auto_map": {}}},
        {"stages": [{"custom_pipelines": {}}]},
    ],
)
def test_a_config_that_brings_code_is_refused(tmp_path, weights, config):
    assert code_of(write_checkpoint(tmp_path / "m", weights, config=config)) == "config_unsafe"


@pytest.mark.parametrize("text", ["[]", "{", '{"a":1,"a":2}', '{"a":NaN}', "\ufeff{}"])
def test_a_config_that_is_no_plain_object_is_refused(tmp_path, weights, text):
    folder = write_checkpoint(tmp_path / "m", weights)
    (folder / "config.json").write_text(text)
    assert code_of(folder) == "not_a_checkpoint"


def test_equal_layouts_match():
    layout = {"a.weight": ("BF16", (4, 4)), "norm.weight": ("BF16", (4,))}
    report = compare_layout(layout, layout)
    assert report.matched == ("a.weight", "norm.weight")
    assert report.is_compatible


def test_a_backbone_of_another_float_type_matches():
    report = compare_layout({"a.weight": ("F16", (4, 4))}, {"a.weight": ("BF16", (4, 4))})
    assert report.is_compatible


def test_a_grown_vocabulary_is_told_from_a_mismatch():
    base = {"model.embed_tokens.weight": ("BF16", (10, 4)), "up.weight": ("BF16", (10, 4))}
    tuned = {"model.embed_tokens.weight": ("BF16", (12, 4)), "up.weight": ("BF16", (12, 4))}
    report = compare_layout(base, tuned)
    assert report.grown_rows == ("model.embed_tokens.weight",)
    assert report.mismatched == ("up.weight: expected [10, 4] found [12, 4]",)
    assert not report.is_compatible


def test_a_transposed_or_retyped_tensor_is_named():
    base = {"a.weight": ("BF16", (4, 8)), "b.weight": ("BF16", (2,))}
    tuned = {"a.weight": ("BF16", (8, 4)), "b.weight": ("I32", (2,))}
    assert compare_layout(base, tuned).mismatched == (
        "a.weight: expected [4, 8] found [8, 4]",
        "b.weight: expected [2] BF16 found [2] I32",
    )


def test_tied_heads_may_be_absent_but_layers_may_not():
    base = {
        "model.embed_tokens.weight": ("BF16", (10, 4)),
        "lm_head.weight": ("BF16", (10, 4)),
        "up.weight": ("BF16", (4, 4)),
    }
    tied = {name: shape for name, shape in base.items() if name != "lm_head.weight"}
    report = compare_layout(base, tied)
    assert report.missing == ("lm_head.weight",)
    assert report.is_compatible
    assert compare_layout(tied, base).unexpected == ("lm_head.weight",)
    del tied["up.weight"]
    assert not compare_layout(base, tied).is_compatible


def test_nothing_in_common_is_not_compatible():
    report = compare_layout({"a.weight": ("F32", (1,))}, {"b.weight": ("F32", (1,))})
    assert not report.is_compatible


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("config.json", True),
        ("tokenizer_config.json", True),
        ("LICENSE.txt", True),
        ("chat_template.jinja", True),
        ("evaluation.jsonl", True),
        ("modeling_llama.py", False),
        ("pytorch_model.bin", False),
        ("../config.json", False),
        (".config.json", False),
        ("tokenizer\n.json", False),
        ("tokenizer/../../x.json", False),
    ],
)
def test_the_list_of_sidecars_is_closed(name, allowed):
    assert is_sidecar(name) == allowed


def test_notes_and_task_files_do_not_travel_with_the_model(tmp_path, weights):
    folder = write_checkpoint(tmp_path / "m", weights)
    for name in ("README.md", "evaluation.jsonl", "training_args.bin", "merges.txt"):
        (folder / name).write_text("x")
    names = [path.name for path in find_sidecars(folder)]
    assert names == ["config.json", "merges.txt", "tokenizer.json"]


def test_vocabulary_tensors_are_known_by_name():
    assert is_vocabulary_tensor("model.embed_tokens.weight")
    assert is_vocabulary_tensor("lm_head.weight")
    assert not is_vocabulary_tensor("lm_head.bias")
    assert not is_vocabulary_tensor("model.layers.0.mlp.up_proj.weight")
