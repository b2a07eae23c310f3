import json
import struct
import tracemalloc

import pytest
from safetensors_frames import entry, frame

from deltacome_core.errors import InternalError, UserError
from deltacome_core.safetensors_file import (
    MAX_HEADER_BYTES,
    check_tensor_name,
    parse_header,
    read_header,
    write_safetensors,
)

DATA = bytes(24)
VALID = frame({"w": entry()}, DATA)


def one(text, data=DATA):
    """A file whose only tensor `w` is described by raw JSON text."""
    return frame('{"w":' + text + "}", data)


def shaped(shape, end=24):
    return one('{"dtype":"F32","shape":' + shape + f',"data_offsets":[0,{end}]}}')


def offsets(text, data=DATA):
    return one('{"dtype":"F32","shape":[2,3],"data_offsets":' + text + "}", data)


def named(name, *, escape=True):
    return frame(json.dumps({name: entry()}, ensure_ascii=escape), DATA)


def two(first, second, size):
    return frame({"a": first, "b": second}, bytes(size))


def with_metadata(metadata):
    return frame({"__metadata__": metadata, "w": entry()}, DATA)


HOSTILE = {
    # length prefix
    "empty file": (b"", "header_truncated"),
    "seven bytes": (VALID[:7], "header_truncated"),
    "length 0": (frame(b""), "header_invalid"),
    "length 1": (frame(b"{", DATA), "header_invalid"),
    "length past the end": (frame("{}", length=3), "header_truncated"),
    "length 2^63": (frame("{}", length=2**63), "header_too_large"),
    "length 2^64-1": (frame("{}", length=2**64 - 1), "header_too_large"),
    "length over 100 MB": (frame("{}", length=100_000_001), "header_too_large"),
    "length one over our limit": (frame("{}", length=MAX_HEADER_BYTES + 1), "header_too_large"),
    "length big-endian": (struct.pack(">Q", 64) + VALID[8:], "header_too_large"),
    # truncation and extra bytes
    "header cut": (VALID[:40], "header_truncated"),
    "data cut": (VALID[:-1], "file_truncated"),
    "no data": (VALID[:-24], "file_truncated"),
    "trailing byte": (VALID + b"\0", "tensor_gap"),
    "zip after the data": (VALID + b"PK\x03\x04", "tensor_gap"),
    # other formats
    "pickle": (b"\x80\x02}q\x00." + bytes(40), "not_safetensors"),
    "pickle protocol 5": (b"\x80\x05\x95" + bytes(40), "not_safetensors"),
    "zip": (b"PK\x03\x04" + bytes(60), "not_safetensors"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(60), "not_safetensors"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(60), "not_safetensors"),
    "numpy": (b"\x93NUMPY\x01\x00" + bytes(60), "not_safetensors"),
    "random bytes": (bytes.fromhex("9f3c77a1e20b5d846e19"), "not_safetensors"),
    "gzip": (b"\x1f\x8b\x08" + bytes(60), "not_safetensors"),
    "short zip": (b"PK\x03\x04", "not_safetensors"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "not_safetensors"),
    # JSON
    "root array": (frame("[]"), "header_invalid"),
    "root null": (frame("null"), "header_invalid"),
    "no tensors": (frame("{}"), "header_invalid"),
    "only metadata": (frame({"__metadata__": {"a": "b"}}), "header_invalid"),
    "two documents": (frame('{"w":1}{}'), "header_invalid"),
    "leading space": (frame(" " + json.dumps({"w": entry()}), DATA), "header_invalid"),
    "byte order mark": (frame("\ufeff" + json.dumps({"w": entry()}), DATA), "header_invalid"),
    "utf-16": (frame(json.dumps({"w": entry()}).encode("utf-16-le"), DATA), "header_invalid"),
    "bad utf-8": (frame(b'{"\xff\xfe":{}}', DATA), "header_invalid"),
    "NaN": (shaped("[NaN]"), "header_invalid"),
    "Infinity": (shaped("[Infinity]"), "header_invalid"),
    "lone surrogate": (frame('{"\\ud800":{}}', DATA), "header_invalid"),
    "lone surrogate in metadata": (
        frame('{"__metadata__":{"a":"\\udfff"},"w":' + json.dumps(entry()) + "}", DATA),
        "header_invalid",
    ),
    "nesting": (frame('{"w":' + "[" * 10_000 + "]" * 10_000 + "}"), "header_invalid"),
    "nested objects": (frame('{"w":' * 10_000 + "1" + "}" * 10_000), "header_invalid"),
    "trailing comma": (frame('{"w":{},}'), "header_invalid"),
    "comment": (frame('{/**/"w":{}}'), "header_invalid"),
    "control character": (frame(b'{"a\x01":{}}'), "header_invalid"),
    "huge integer": (shaped("[" + "9" * 5000 + "]"), "header_invalid"),
    # duplicates
    "tensor twice, same": (
        frame('{"w":' + json.dumps(entry()) + ',"w":' + json.dumps(entry()) + "}", DATA),
        "duplicate_tensor",
    ),
    "tensor twice, escaped": (
        frame('{"w":' + json.dumps(entry()) + ',"\\u0077":' + json.dumps(entry()) + "}", DATA),
        "duplicate_tensor",
    ),
    "dtype twice": (
        one('{"dtype":"F32","dtype":"F32","shape":[2,3],"data_offsets":[0,24]}'),
        "duplicate_tensor",
    ),
    "metadata twice": (
        frame('{"__metadata__":{},"__metadata__":{},"w":' + json.dumps(entry()) + "}", DATA),
        "duplicate_tensor",
    ),
    "metadata key twice": (
        frame('{"__metadata__":{"a":"1","a":"2"},"w":' + json.dumps(entry()) + "}", DATA),
        "duplicate_tensor",
    ),
    # shape
    "shape float": (shaped("[2.0,3]"), "header_invalid"),
    "shape exponent": (shaped("[2e0,3]"), "header_invalid"),
    "shape negative": (shaped("[-2,-3]"), "header_invalid"),
    "shape minus zero": (shaped("[-0]", end=0), "header_invalid"),
    "shape bool": (shaped("[true]", end=4), "header_invalid"),
    "shape text": (shaped('["2",3]'), "header_invalid"),
    "shape null": (shaped("null"), "header_invalid"),
    "shape object": (shaped("{}"), "header_invalid"),
    "shape nested": (shaped("[[2,3]]"), "header_invalid"),
    "shape over u63": (shaped(f"[{2**63}]"), "header_invalid"),
    "shape product wraps to 24": (shaped(f"[{2**62},4,6]"), "header_invalid"),
    "shape 0 x huge": (shaped(f"[0,{2**62},{2**62}]", end=0), "header_invalid"),
    "rank 9": (shaped("[1,1,1,1,1,1,1,2,3]"), "header_invalid"),
    "rank 100,000": (shaped("[" + "1," * 99_999 + "1]"), "header_invalid"),
    "shape too small": (shaped("[2,2]"), "header_invalid"),
    "shape too large": (shaped("[2,4]"), "header_invalid"),
    # dtype
    "dtype unknown": (frame({"w": entry(dtype="F128")}, DATA), "unknown_dtype"),
    "dtype lower case": (frame({"w": entry(dtype="f32")}, DATA), "unknown_dtype"),
    "dtype sub-byte": (frame({"w": entry(dtype="F4", end=3)}, bytes(3)), "unknown_dtype"),
    "dtype object": (frame({"w": entry(dtype={"a": 1})}, DATA), "unknown_dtype"),
    "dtype list": (frame({"w": entry(dtype=["F32"])}, DATA), "unknown_dtype"),
    "dtype null": (frame({"w": entry(dtype=None)}, DATA), "unknown_dtype"),
    # offsets
    "offsets reversed": (offsets("[24,0]"), "header_invalid"),
    "offsets three": (offsets("[0,24,24]"), "header_invalid"),
    "offsets one": (offsets("[24]"), "header_invalid"),
    "offsets past the end": (
        frame({"w": entry(shape=(2, 30), end=240)}, DATA),
        "file_truncated",
    ),
    "offsets wrap": (offsets(f"[{2**64 - 24},{2**64}]"), "header_invalid"),
    "offsets float": (offsets("[0.0,24.0]"), "header_invalid"),
    "offsets negative": (offsets("[-24,0]"), "header_invalid"),
    "offsets not at zero": (frame({"w": entry(start=8, end=32)}, bytes(32)), "tensor_gap"),
    "gap": (two(entry(), entry(start=28, end=52), 52), "tensor_gap"),
    "overlap": (two(entry(), entry(start=20, end=44), 44), "tensor_overlap"),
    "same bytes twice": (two(entry(), entry(), 24), "tensor_overlap"),
    "empty tensor inside another": (
        two(entry(), entry(shape=(0,), start=8, end=8), 24),
        "tensor_overlap",
    ),
    # fields
    "entry null": (one("null"), "header_invalid"),
    "entry list": (one("[]"), "header_invalid"),
    "dtype missing": (one('{"shape":[2,3],"data_offsets":[0,24]}'), "header_invalid"),
    "shape missing": (one('{"dtype":"F32","data_offsets":[0,24]}'), "header_invalid"),
    "offsets missing": (one('{"dtype":"F32","shape":[2,3]}'), "header_invalid"),
    "unknown field": (frame({"w": entry(extra=1)}, DATA), "header_invalid"),
    # metadata
    "metadata null": (with_metadata(None), "header_invalid"),
    "metadata number": (with_metadata({"a": 1}), "header_invalid"),
    "metadata nested": (with_metadata({"a": {"b": "c"}}), "header_invalid"),
    "metadata large": (with_metadata({"a": "x" * (64 << 10)}), "header_invalid"),
    "metadata many": (with_metadata({str(n): "" for n in range(257)}), "header_invalid"),
    # names
    "name empty": (named(""), "name_unsafe"),
    "name parent": (named("../../etc/passwd"), "name_unsafe"),
    "name absolute": (named("/etc/passwd"), "name_unsafe"),
    "name backslash": (named("..\\windows"), "name_unsafe"),
    "name NUL": (named("a\0b"), "name_unsafe"),
    "name newline": (named("a\nb"), "name_unsafe"),
    "name escape": (named("a\x1b[31m"), "name_unsafe"),
    "name html": (named("<img src=x onerror=alert(1)>"), "name_unsafe"),
    "name right-to-left": (named("w\u202etxt", escape=False), "name_unsafe"),
    "name zero width": (named("w\u200b", escape=False), "name_unsafe"),
    "name decomposed": (named("e\u0301", escape=False), "name_unsafe"),
    "name blank": (named(" w "), "name_unsafe"),
    "name long": (named("w" * 257), "name_unsafe"),
}


@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_a_hostile_file_is_refused_with_its_code(case, tmp_path):
    raw, code = HOSTILE[case]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(raw)
    with pytest.raises(UserError) as from_file:
        read_header(path)
    with pytest.raises(UserError) as from_bytes:
        parse_header(raw, file_size_bytes=len(raw))
    assert from_file.value.code == from_bytes.value.code == code
    assert str(from_file.value).isprintable()
    assert len(str(from_file.value)) < 600


FLOODS = {
    "a million empty tensors": b"{" + b",".join(b'"%06x":{}' % n for n in range(600_000)) + b"}",
    "a million brackets": b'{"w":[' + b"[]," * 2_600_000 + b"1]}",
    "a million quotes": b'{"__metadata__":{' + b'"":"",' * 1_300_000 + b'"":""}}',
    "eight million digits": b'{"w":' + b"1" * (MAX_HEADER_BYTES - 10) + b"}",
    "four million dimensions": b'{"w":{"dtype":"U8","shape":['
    + b"1," * 4_000_000
    + b'1],"data_offsets":[0,1]}}',
    "only open braces": b'{"a":' * 1_600_000,
    "one name of 8 MiB": b'{"' + b"w" * (MAX_HEADER_BYTES - 8) + b'":1}',
}


@pytest.mark.parametrize("case", sorted(FLOODS))
def test_a_flood_is_refused_in_bounded_memory(case, tmp_path):
    path = tmp_path / "flood.safetensors"
    path.write_bytes(frame(FLOODS[case], DATA))
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            read_header(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.code in {"header_invalid", "name_unsafe"}
    assert peak_bytes < 120 << 20


def test_65_536_tensors_are_read_and_one_more_is_refused(tmp_path):
    def build(count):
        header = {
            f"t{n}": {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]} for n in range(count)
        }
        text = json.dumps(header, separators=(",", ":"))
        path = tmp_path / f"{count}.safetensors"
        path.write_bytes(frame(text, bytes(count)))
        return path

    assert len(read_header(build(65_536)).tensors) == 65_536
    with pytest.raises(UserError, match="65537 tensors"):
        read_header(build(65_537))


def test_the_valid_control_is_read():
    header = parse_header(VALID, file_size_bytes=len(VALID))
    assert [info.name for info in header.tensors] == ["w"]
    assert header.tensors[0].size_bytes == 24
    assert header.data_start == len(VALID) - 24


def test_the_header_alone_is_enough_before_the_data_arrive():
    header = parse_header(VALID[:-24], file_size_bytes=len(VALID))
    assert header.size_bytes == len(VALID)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(UserError) as caught:
            read_header(path)
        assert caught.value.code == "file_missing"


@pytest.mark.parametrize(
    "name", ["w", "model.layers.0.self_attn.q_proj.weight", "unet/down.0", "größe", "a b"]
)
def test_ordinary_names_are_allowed(name):
    check_tensor_name(name)


def test_equal_input_gives_equal_bytes_and_order_is_kept(tmp_path):
    sources = [("b", "U8", (3,), b"abc"), ("a", "F16", (1, 2), b"\0\x3c\0\x40")]
    write_safetensors(tmp_path / "1", sources, {"k": "v"})
    chunked = [("b", "U8", (3,), iter([b"a", b"", b"bc"])), sources[1]]
    write_safetensors(tmp_path / "2", chunked, {"k": "v"})
    raw = (tmp_path / "1").read_bytes()
    assert raw == (tmp_path / "2").read_bytes()
    assert raw[256:] == b"abc\0\x3c\0\x40"
    assert [info.name for info in read_header(tmp_path / "1").tensors] == ["b", "a"]


@pytest.mark.parametrize("data", [b"ab", b"abcd", b""])
def test_data_of_another_length_are_our_error(tmp_path, data):
    with pytest.raises(InternalError, match="off by"):
        write_safetensors(tmp_path / "x", [("a", "U8", (3,), data)], {})


def test_the_writer_never_writes_what_the_reader_refuses(tmp_path):
    with pytest.raises(UserError):
        write_safetensors(tmp_path / "x", [("a/../b", "U8", (1,), b"a")], {})
    with pytest.raises(InternalError):
        write_safetensors(tmp_path / "y", [("a", "U8", (1,), b"a")] * 2, {})
    assert list(tmp_path.iterdir()) == []


def test_the_writer_does_not_overwrite(tmp_path):
    (tmp_path / "x").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "x", [("a", "U8", (1,), b"a")], {})
    assert (tmp_path / "x").read_bytes() == b"mine"
