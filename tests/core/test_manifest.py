import copy
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltacome_core.entries import (
    DirectEntry,
    ExactEntry,
    LowRankEntry,
    RowsEntry,
    UnchangedEntry,
    expected_tensors,
    group_of,
    site_order,
)
from deltacome_core.errors import UserError
from deltacome_core.layout import RankBand
from deltacome_core.manifest import (
    BackboneRecord,
    CalibrationRecord,
    DeltaManifest,
    FileRecord,
    FineTuneRecord,
    RecipeRecord,
    manifest_to_json,
    parse_manifest,
    read_manifest,
)
from deltacome_core.recipe import PRESETS

SHA = "ab" * 32
QUERY = "model.layers.0.self_attn.q_proj.weight"
KEY = "model.layers.0.self_attn.k_proj.weight"
EMBED = "model.embed_tokens.weight"
NORM = "model.layers.0.input_layernorm.weight"
MANIFEST = DeltaManifest(
    recipe=RecipeRecord(name="come", settings=PRESETS["come"].settings),
    backbone=BackboneRecord(
        digest=SHA, tensors={QUERY: SHA, KEY: SHA, EMBED: SHA, "model.norm.weight": SHA}
    ),
    fine_tune=FineTuneRecord(
        digest=SHA, size_bytes=1000, dtype="BF16", n_params=500, architecture="LlamaForCausalLM"
    ),
    entries=(
        LowRankEntry(
            name=QUERY,
            dtype="BF16",
            shape=(64, 48),
            group="model.layers.0",
            bands=(RankBand(8, 1), RankBand(2, 9)),
            group_u=(1, 128),
            group_v=(1, 128),
            symmetric=False,
        ),
        RowsEntry(
            name=EMBED,
            dtype="BF16",
            shape=(42, 48),
            base_rows=40,
            n_changed=7,
            bits=4,
            group_rows=(1, 128),
            symmetric=True,
        ),
        ExactEntry(name=NORM, dtype="F32", shape=(48,)),
        UnchangedEntry(name="model.norm.weight", dtype="BF16", shape=(48,)),
        DirectEntry(
            name=KEY,
            dtype="BF16",
            shape=(24, 48),
            group="model.layers.0",
            bits=1,
            group_codes=(1, 0),
            symmetric=True,
        ),
    ),
    files={
        "delta.safetensors": FileRecord(sha256=SHA, size_bytes=9),
        "config.json": FileRecord(sha256=SHA, size_bytes=2),
    },
    tools={"deltacome": "0.1.0", "torch": "2.13.0"},
    calibration=CalibrationRecord(
        source="calibration.txt", n_tokens=4096, sha256=SHA, n_matrices=1
    ),
)
DOCUMENT = json.loads(manifest_to_json(MANIFEST))


def test_a_manifest_survives_the_round_trip():
    assert parse_manifest(manifest_to_json(MANIFEST)) == MANIFEST
    data_free = replace(MANIFEST, calibration=None)
    assert parse_manifest(manifest_to_json(data_free)) == data_free


def test_the_json_is_canonical():
    raw = manifest_to_json(MANIFEST)
    assert b" " not in raw
    assert b"\n" not in raw
    shuffled = json.dumps(DOCUMENT, indent=2).encode()
    assert manifest_to_json(parse_manifest(shuffled)) == raw


def test_the_expected_tensors_follow_from_the_entries():
    # sigma 40 -> 48, V8 48 + 2 + 1 -> 48 + 16 + 16, U8 256 + 128 + 64, V2 9 x 3 words = 108 -> 112
    # + 18 -> 32 + 9 -> 16, U2 64 x 1 word = 256 + 128 + 64; 1232 in all, padded to 1280.
    # Direct: 24 rows of 2 words + 24 scales = 240, padded to 256.
    assert expected_tensors(MANIFEST.entries) == {
        "packed.model.layers.0": ("U8", (1536,)),
        f"packed.{EMBED}": ("U8", (256,)),
        f"new.{EMBED}": ("BF16", (2, 48)),
        f"exact.{NORM}": ("F32", (48,)),
    }


def test_layers_are_groups_and_the_rest_is_one():
    assert group_of("model.layers.12.mlp.up_proj.weight") == "model.layers.12"
    assert group_of("transformer.h.3.attn.weight") == "transformer.h.3"
    assert group_of("model.layers.0.mlp.experts.5.up_proj.weight") == "model.layers.0"
    assert group_of("vision.proj.weight") == "rest"


def test_fused_projections_lie_next_to_each_other():
    sites = ["mlp.up_proj", "self_attn.o_proj", "self_attn.v_proj", "mlp.down_proj"]
    sites += ["mlp.gate_proj", "self_attn.q_proj", "other", "self_attn.k_proj"]
    names = [f"model.layers.0.{site}.weight" for site in sites]
    ordered = [name.split(".")[-2][0] for name in sorted(names, key=site_order)]
    assert "".join(ordered) == "qkvogudo"


def set_at(path, value):
    def change(document):
        target = document
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


def delete_at(path):
    def change(document):
        target = document
        for key in path[:-1]:
            target = target[key]
        del target[path[-1]]

    return change


def entry(number, **fields):
    return lambda document: document["entries"][number].update(fields)


HOSTILE = {
    "format of another program": set_at(["format"], "gguf"),
    "format missing": delete_at(["format"]),
    "version text": set_at(["format_version"], "1"),
    "version true": set_at(["format_version"], True),
    "unknown top field": set_at(["extra"], 1),
    "entries object": set_at(["entries"], {}),
    "entry null": set_at(["entries"], [None]),
    "entries too many": lambda document: document.update(entries=[1] * 65_537),
    "entry twice": lambda document: document["entries"].append(document["entries"][2]),
    "entry without backbone hash": delete_at(["backbone", "tensors", QUERY]),
    "kind unknown": entry(0, kind="sparse"),
    "kind of another entry": entry(0, kind="exact"),
    "field unknown": entry(0, offset=4),
    "field missing": delete_at(["entries", 0, "group_u"]),
    "dtype unknown": entry(0, dtype="F4"),
    "bits 0": entry(0, bands=[[0, 2]]),
    "bits 5": entry(0, bands=[[5, 2]]),
    "bits true": entry(0, bands=[[True, 2]]),
    "rank 0": entry(0, bands=[[2, 0]]),
    "rank negative": entry(0, bands=[[2, -1]]),
    "rank over the shape": entry(0, bands=[[2, 49]]),
    "ranks together over the shape": entry(0, bands=[[8, 24], [2, 25]]),
    "rank 2^63": entry(0, bands=[[2, 2**63]]),
    "no bands": entry(0, bands=[]),
    "nine bands": entry(0, bands=[[2, 1]] * 9),
    "band of three": entry(0, bands=[[2, 1, 1]]),
    "bands flat": entry(0, bands=[2, 1]),
    "shape 1-D": entry(0, shape=[64]),
    "shape 4-D": entry(0, shape=[1, 1, 64, 48]),
    "stack of no slices": entry(0, shape=[0, 64, 48]),
    "rank over the slices": entry(0, shape=[64, 48, 9]),
    "transposed number": entry(0, transposed=1),
    "rows of a stack": entry(1, shape=[2, 42, 48]),
    "shape zero": entry(0, shape=[0, 48]),
    "shape float": entry(0, shape=[64.0, 48]),
    "shape over 2^31": entry(0, shape=[2**31, 48]),
    "group of one": entry(0, group_u=[1]),
    "group negative": entry(0, group_v=[1, -128]),
    "group huge": entry(0, group_v=[1, 2**40]),
    "group of another layer": entry(0, group="model.layers.1"),
    "symmetric number": entry(0, symmetric=0),
    "rows bits 7": entry(1, bits=7),
    "rows scaled without a basis": entry(1, scaled=True),
    "rows scaled of which some are as they were": entry(1, n_changed=39, rank=4, scaled=True),
    "rows more changed than there are": entry(1, n_changed=41),
    "rows base over shape": entry(1, base_rows=43),
    "rows base zero": entry(1, base_rows=0, n_changed=0),
    "direct bits 5": entry(4, bits=5),
    "direct bits true": entry(4, bits=True),
    "direct with bands": entry(4, bands=[[1, 2]]),
    "direct group of another layer": entry(4, group="rest"),
    "direct scale group huge": entry(4, group_codes=[1, 2**17]),
    "direct without scale group": delete_at(["entries", 4, "group_codes"]),
    "direct shape 1-D": entry(4, shape=[48]),
    "direct shape zero": entry(4, shape=[24, 0]),
    "exact rank 9": entry(2, shape=[1] * 9),
    "exact too large": entry(2, shape=[2**31 - 1] * 3),
    "digest short": set_at(["backbone", "digest"], "ab"),
    "digest upper case": set_at(["backbone", "digest"], "AB" * 32),
    "digest null": set_at(["fine_tune", "digest"], None),
    "hash newline": set_at(["backbone", "tensors", QUERY], SHA + "\n"),
    "sizes 2^63": set_at(["fine_tune", "size_bytes"], 2**63),
    "architecture of escapes": set_at(["fine_tune", "architecture"], "\x1b[2J"),
    "recipe infinite": set_at(["recipe", "bits_per_param"], float("inf")),
    "recipe nested": set_at(["recipe", "bits_per_param"], [1]),
    "recipe setting name": set_at(["recipe", "Bits"], 1),
    "recipe without name": delete_at(["recipe", "name"]),
    "files list": set_at(["files"], []),
    "files differ in case only": set_at(["files", "CONFIG.json"], {"sha256": SHA, "size": 2}),
    "files name the manifest": set_at(["files", "delta.json"], {"sha256": SHA, "size": 2}),
    "file size negative": set_at(["files", "config.json", "size"], -1),
    "tools list": set_at(["tools"], []),
    "calibration text": set_at(["calibration"], "none"),
}
UNSAFE_NAMES = {
    "entry of a path": entry(0, name="../../x"),
    "entry of markup": entry(0, name="<b>"),
    "file in a folder": set_at(["files", "a/b.json"], {"sha256": SHA, "size": 2}),
    "file above": set_at(["files", "..json"], {"sha256": SHA, "size": 2}),
    "file of code": set_at(["files", "modeling.py"], {"sha256": SHA, "size": 2}),
    "file of a device": set_at(["files", "con\0.json"], {"sha256": SHA, "size": 2}),
    "backbone tensor of markup": set_at(["backbone", "tensors", "<b>"], SHA),
}


def refuse(document):
    with pytest.raises(UserError) as caught:
        parse_manifest(json.dumps(document).encode())
    return caught.value


@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_a_damaged_manifest_is_refused(case):
    document = copy.deepcopy(DOCUMENT)
    HOSTILE[case](document)
    error = refuse(document)
    assert error.code == "delta_invalid"
    assert str(error).isprintable()


@pytest.mark.parametrize("case", sorted(UNSAFE_NAMES))
def test_an_unsafe_name_is_refused(case):
    document = copy.deepcopy(DOCUMENT)
    UNSAFE_NAMES[case](document)
    assert refuse(document).code == "name_unsafe"


@pytest.mark.parametrize("version", [0, 2, 99])
def test_another_version_is_told_apart(version):
    document = copy.deepcopy(DOCUMENT)
    document["format_version"] = version
    document["something_new"] = {}
    assert refuse(document).code == "delta_version_unsupported"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff",
        b'{"format":"deltacome","format":"deltacome"}',
        b'{"format":NaN}',
        b"[" * 100_000,
        b'{"a":' + b"9" * 5000 + b"}",
    ],
)
def test_bytes_that_are_no_manifest_are_refused(raw):
    with pytest.raises(UserError) as caught:
        parse_manifest(raw)
    assert caught.value.code == "delta_invalid"


def test_a_manifest_beyond_32_mib_is_not_even_read(tmp_path):
    with (tmp_path / "delta.json").open("wb") as file:
        file.truncate((32 << 20) + 1)
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert caught.value.code == "delta_invalid"


def test_a_folder_without_a_manifest_says_so(tmp_path):
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert caught.value.code == "file_missing"


def test_two_entries_cannot_claim_one_tensor():
    rows = replace(MANIFEST.entries[1], name="model.layers.0")
    with pytest.raises(UserError, match="claim"):
        expected_tensors([MANIFEST.entries[0], rows])


def paths_in(value, prefix=()):
    yield prefix
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in items:
        yield from paths_in(child, (*prefix, key))


def outcome(raw):
    try:
        return parse_manifest(raw), None
    except UserError as error:
        return None, error.code


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.lists(st.integers(-1, 5), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


@settings(max_examples=400, deadline=None)
@given(path=st.sampled_from([path for path in paths_in(DOCUMENT) if path]), junk=JUNK)
def test_any_value_anywhere_is_read_or_refused_never_a_crash(path, junk):
    document = copy.deepcopy(DOCUMENT)
    set_at(path, junk)(document)
    manifest, code = outcome(json.dumps(document).encode())
    if manifest is None:
        assert code in {"delta_invalid", "delta_version_unsupported", "name_unsafe"}
    else:
        assert outcome(manifest_to_json(manifest)) == (manifest, None)
