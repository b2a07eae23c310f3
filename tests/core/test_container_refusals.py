"""Delta folders that no writer made are refused, never misread."""

import shutil
from dataclasses import replace

import pytest
import torch
from factories_core import rewrite_entry, rewrite_manifest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from packed_folders import DOWN, EMBED, KEY, LAYER, NORM, QUERY, make_folders

from deltacome_core.container import open_delta
from deltacome_core.delta_folder import hash_file
from deltacome_core.errors import UserError
from deltacome_core.layout import RankBand
from deltacome_core.manifest import read_manifest
from deltacome_core.packed import PackedLinear, PackedRows

HALF_NAN, HALF_INF, HALF_MINUS_ONE = b"\x00\x7e", b"\x00\x7c", b"\x00\xbc"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture
def delta_dir(folders, tmp_path):
    shutil.copytree(folders / "delta", tmp_path / "delta")
    return tmp_path / "delta"


def read_everything(folder, *, verify_digests=False):
    delta = open_delta(folder, verify_digests=verify_digests)
    packed = [delta.load(name) for name in delta.names]
    numbers = [item.dequantise() for item in packed if isinstance(item, PackedLinear | PackedRows)]
    assert all(bool(torch.isfinite(values).all()) for values in numbers)


def refuse(folder, *, verify_digests=False):
    """Read everything; return the code of the refusal."""
    with pytest.raises(UserError) as caught:
        read_everything(folder, verify_digests=verify_digests)
    return caught.value.code


def sign_again(folder):
    """Make the manifest's file records true again, as an attacker would."""
    files = {name: hash_file(folder / name) for name in read_manifest(folder).files}
    rewrite_manifest(folder, files=files)


def patch_section(folder, name, key, value):
    """Overwrite the first bytes of a section of an entry's payload, then sign again."""
    delta = open_delta(folder)
    entry = delta.entry(name)
    stored = f"packed.{entry.group}" if name in {QUERY, KEY} else f"packed.{name}"
    section = next(item for item in entry.payload.sections if item.key == key)
    start = delta.folder.stored[stored].start + delta.offsets.get(name, 0) + section.start
    with (folder / "delta.safetensors").open("r+b") as file:
        file.seek(start)
        file.write(value)
    sign_again(folder)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        (QUERY, "sigma", b"\x00\x00\xc0\x7f"),
        (QUERY, "sigma", b"\x00\x00\x80\x7f"),
        (QUERY, "sigma", b"\x00\x00\x80\xbf"),
        (QUERY, "sigma", b"\x00\x00\x80\x7e"),
        (QUERY, "0.v.scale", HALF_NAN),
        (QUERY, "2.u.scale", HALF_INF),
        (QUERY, "1.u.scale", HALF_MINUS_ONE),
        (QUERY, "1.v.zero", b"\x08"),
        (QUERY, "2.u.zero", b"\x04"),
        (QUERY, "2.u.codes", b"\xff\xff\xff\xff"),
        (QUERY, "1.u.codes", b"\xff\xff\xff\xff"),
        (KEY, "direct.scale", HALF_NAN),
        (KEY, "direct.scale", HALF_MINUS_ONE),
        (KEY, "direct.zero", b"\x08"),
        (KEY, "direct.codes", b"\xff" * 16),
        (EMBED, "changed", b"\xff"),
        (EMBED, "changed", b"\x00"),
        (EMBED, "rows.scale", HALF_NAN),
        (EMBED, "rows.zero", b"\x10"),
    ],
)
def test_numbers_no_writer_produces_are_refused(delta_dir, name, key, value):
    patch_section(delta_dir, name, key, value)
    assert refuse(delta_dir, verify_digests=True) == "delta_invalid"


def test_a_set_padding_bit_is_refused(delta_dir):
    delta = open_delta(delta_dir)
    entry = delta.entry(QUERY)
    last = delta.folder.stored[f"packed.{LAYER}"].start + entry.payload.size_bytes - 1
    sections = entry.payload.sections
    assert sections[-1].start + sections[-1].size_bytes < entry.payload.size_bytes
    with (delta_dir / "delta.safetensors").open("r+b") as file:
        file.seek(last)
        file.write(b"\x01")
    sign_again(delta_dir)
    assert refuse(delta_dir) == "delta_invalid"


@pytest.mark.parametrize("where", [0, 300, 3000, -1])
def test_a_flipped_bit_breaks_the_digest(delta_dir, where):
    path = delta_dir / "delta.safetensors"
    raw = bytearray(path.read_bytes())
    raw[where] ^= 1
    path.write_bytes(raw)
    assert refuse(delta_dir, verify_digests=True) == "file_digest_mismatch"


@pytest.mark.parametrize("name", ["delta.safetensors", "config.json", "tokenizer.json"])
def test_a_missing_or_shortened_file_is_noticed_without_hashing(delta_dir, name):
    path = delta_dir / name
    path.write_bytes(path.read_bytes()[:-1])
    assert refuse(delta_dir) == "file_digest_mismatch"
    path.unlink()
    assert refuse(delta_dir) == "file_missing"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        (QUERY, {"shape": (48, 49)}),
        (QUERY, {"shape": (96, 24)}),
        (QUERY, {"shape": (2**31 - 1, 48)}),
        (QUERY, {"bands": (RankBand(8, 1), RankBand(3, 2), RankBand(2, 40))}),
        (QUERY, {"bands": (RankBand(8, 1), RankBand(3, 2))}),
        (QUERY, {"symmetric": True}),
        (QUERY, {"group_u": (1, 1)}),
        (KEY, {"bits": 8}),
        (KEY, {"shape": (25, 48)}),
        (KEY, {"group_codes": (1, 1)}),
        (EMBED, {"n_changed": 19}),
        (EMBED, {"base_rows": 39}),
        (EMBED, {"shape": (44, 48)}),
        (EMBED, {"shape": (43, 47)}),
        (EMBED, {"bits": 8}),
        (NORM, {"shape": (47,)}),
        (NORM, {"dtype": "F16"}),
        (DOWN, {"transposed": True}),
        (DOWN, {"shape": (2, 48, 96)}),
        (DOWN, {"shape": (2**31 - 1, 48, 96)}),
    ],
)
def test_an_entry_that_contradicts_the_data_is_refused(delta_dir, name, fields):
    rewrite_entry(delta_dir, name, **fields)
    assert refuse(delta_dir) == "delta_invalid"


def test_a_missing_and_an_extra_entry_are_refused(delta_dir):
    entries = read_manifest(delta_dir).entries
    without = tuple(entry for entry in entries if entry.name != NORM)
    rewrite_manifest(delta_dir, entries=without)
    assert refuse(delta_dir) == "delta_invalid"
    rewrite_manifest(delta_dir, entries=(*entries, replace(entries[-1], name="ghost")))
    assert refuse(delta_dir) == "delta_invalid"


def test_an_entry_of_another_name_is_refused(delta_dir):
    entries = read_manifest(delta_dir).entries
    renamed = tuple(replace(entry, name=entry.name.replace("input", "other")) for entry in entries)
    rewrite_manifest(delta_dir, entries=renamed)
    assert refuse(delta_dir) == "delta_invalid"


def test_a_tensor_in_two_data_files_is_refused(delta_dir):
    shutil.copy(delta_dir / "delta.safetensors", delta_dir / "delta-00001-of-00001.safetensors")
    files = dict(read_manifest(delta_dir).files)
    files["delta-00001-of-00001.safetensors"] = files["delta.safetensors"]
    rewrite_manifest(delta_dir, files=files)
    assert refuse(delta_dir) == "delta_invalid"


def test_entries_in_another_order_are_noticed(delta_dir):
    entries = read_manifest(delta_dir).entries
    rewrite_manifest(delta_dir, entries=tuple(reversed(entries)))
    assert refuse(delta_dir) == "delta_invalid"


@pytest.mark.parametrize("size", [0, 1, 8, 200, 256, 1000])
def test_a_cut_data_file_is_refused_even_when_signed(delta_dir, size):
    path = delta_dir / "delta.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    sign_again(delta_dir)
    assert refuse(delta_dir) == "delta_invalid"


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_changed_bytes_are_read_or_refused_never_a_crash(folders, tmp_path, data):
    folder = tmp_path / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folders / "delta", folder)
    raw = bytearray((folder / "delta.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.one_of(st.integers(0, 1500), st.integers(0, len(raw) - 1)))
        raw[at] = data.draw(st.integers(0, 255))
    (folder / "delta.safetensors").write_bytes(raw)
    sign_again(folder)
    try:
        read_everything(folder)
    except UserError as error:
        event(error.code)
        if error.code != "delta_invalid":
            raise
