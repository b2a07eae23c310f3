"""Every example in docs/format.md holds."""

import hashlib
import json
import re
import struct
from math import prod
from pathlib import Path

import pytest
import torch
import zstandard

from deltacome_core import layout, parts, safetensors_file
from deltacome_core.bitpack import PLANES, pack_codes, unpack_codes, words_per_row
from deltacome_core.checkpoint import checkpoint_digest
from deltacome_core.entries import expected_tensors
from deltacome_core.entries_json import parse_entries
from deltacome_core.lossless import BLOCK_ELEMENTS, encode_blocks, slice_elements
from deltacome_core.manifest import FORMAT_VERSION
from deltacome_core.payload import matrix_from_payload, matrix_to_payload
from deltacome_core.precision import SCHEMES
from deltacome_core.rounding import round_values
from deltacome_core.safetensors_file import ITEM_BYTES
from deltacome_core.tensors import TORCH_DTYPES

DOC = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text()


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL)


def only_json(kind):
    (text,) = blocks(f"json {kind}")
    return json.loads(text)


def read_words(texts):
    return torch.tensor([int(text, 16) for text in texts]).to(torch.uint16)


def dump(kind):
    """Read a hex dump; lines that are not shown are zero."""
    (text,) = blocks(f"hex {kind}")
    raw = bytearray()
    for line in text.splitlines():
        offset, _, data = line.partition("  ")
        assert len(raw) <= int(offset, 16)
        raw = raw.ljust(int(offset, 16), b"\0") + bytes.fromhex(data)
    return raw


ROWS = [json.loads(text) for text in blocks("json row")]


def test_every_bit_width_has_an_example():
    assert {row["bits"] for row in ROWS} == set(PLANES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{len(row['codes'])}@{row['bits']}")
def test_a_row_packs_to_the_printed_words(row):
    words = pack_codes(torch.tensor([row["codes"]]), row["bits"])
    assert [f"{word & 0xFFFFFFFF:08x}" for word in words[0].tolist()] == row["words"]
    assert unpack_codes(words, row["bits"], len(row["codes"])).tolist() == [row["codes"]]


def test_the_table_of_planes_is_the_one_in_use():
    printed = re.findall(r"^\| (\d) \| ([\d, ]+) \| ([\d +]+) \|$", DOC, re.MULTILINE)
    table = {int(bits): tuple(map(int, planes.split(","))) for bits, planes, _ in printed}
    assert table == PLANES
    for bits, _, words in printed:
        assert words_per_row(128, int(bits)) == sum(map(int, words.split("+")))


@pytest.fixture
def entry():
    return parse_entries([only_json("entry")])[0]


@pytest.fixture
def payload():
    return dump("payload").ljust(256, b"\0")


def test_the_printed_payload_decodes_to_the_printed_numbers(entry, payload):
    matrix = matrix_from_payload(entry, torch.frombuffer(payload, dtype=torch.uint8))
    (band,) = matrix.bands
    decoded = {
        "sigma": matrix.sigma.tolist(),
        "v_codes": unpack_codes(band.v.codes, 3, 3).tolist(),
        "v": band.v.dequantise().tolist(),
        "u_codes": unpack_codes(band.u.codes, 3, 2).tolist(),
        "u": band.u.dequantise().tolist(),
        "delta": matrix.dequantise().tolist(),
    }
    assert decoded == only_json("decoded")
    assert matrix_to_payload(entry, matrix) == bytes(payload)


def test_the_printed_direct_payload_decodes_to_the_printed_numbers():
    (entry,) = parse_entries([only_json("direct entry")])
    payload = dump("direct payload").ljust(entry.payload.size_bytes, b"\0")
    matrix = matrix_from_payload(entry, torch.frombuffer(payload, dtype=torch.uint8))
    decoded = {
        "codes": unpack_codes(matrix.factor.codes, 1, 3).tolist(),
        "delta": matrix.dequantise().tolist(),
    }
    assert decoded == only_json("direct decoded")
    assert matrix_to_payload(entry, matrix) == bytes(payload)
    assert [section.start for section in entry.payload.sections] == [0, 16]


def test_the_printed_payload_can_be_read_with_the_page_alone(payload):
    sigma = struct.unpack_from("<2f", payload, 0)

    def codes(start, rows, n):
        found = []
        for row in range(rows):
            low, high = struct.unpack_from("<2I", payload, start + 8 * row)
            found.append([(low >> 2 * k & 3) | (high >> k & 1) << 2 for k in range(n)])
        return found

    def values(start, rows, n):
        scale = struct.unpack_from(f"<{rows}e", payload, start + 16)
        zero = payload[start + 32 : start + 32 + rows]
        return [
            [(code - zero[row]) * scale[row] for code in line]
            for row, line in enumerate(codes(start, rows, n))
        ]

    v, u = values(16, 2, 3), values(64, 2, 2)
    delta = [
        [sum(u[row][k] * sigma[k] * v[k][col] for k in range(2)) for col in range(3)]
        for row in range(2)
    ]
    assert delta == only_json("decoded")["delta"]


def test_the_printed_offsets_are_those_of_the_layout(entry):
    starts = [section.start for section in entry.payload.sections]
    text = DOC[DOC.index("has seven sections") :].replace("\n", " ")
    assert [int(at) for at in re.findall(r" at (\d+)", text)[:7]] == starts
    assert entry.payload.size_bytes == 256


SLICES = [json.loads(text) for text in blocks("json slices")]


@pytest.mark.parametrize("example", SLICES, ids=lambda example: str(example["shape"]))
def test_a_printed_shape_is_cut_into_the_printed_matrices(example):
    raw = only_json("entry") | {"bands": [[3, 2], [2, 1]]}
    raw |= {key: example[key] for key in ("shape", "transposed")}
    (entry,) = parse_entries([raw])
    assert entry.n_slices == example["n_slices"]
    assert entry.matrix_shape == (example["out"], example["in"])
    stored = expected_tensors([entry])["packed.model.layers.0"][1][0]
    assert stored == example["n_slices"] * entry.payload.size_bytes


def test_the_printed_row_map_marks_the_printed_rows():
    raw = dump("rowmap")
    marked = [row for row in range(11) if raw[row // 8] >> row % 8 & 1]
    assert marked == [0, 3, 8, 10]


def test_the_printed_digest_is_that_of_the_printed_tensors():
    example = only_json("digest")
    table = {name: (dtype, tuple(shape)) for name, (dtype, shape) in example["tensors"].items()}
    hashes = {
        name: hashlib.sha256(bytes(prod(shape) * ITEM_BYTES[dtype])).hexdigest()
        for name, (dtype, shape) in table.items()
    }
    assert checkpoint_digest(table, hashes) == example["digest"]


def test_the_stated_limits_are_those_of_the_code():
    assert f"version {FORMAT_VERSION}" in DOC.splitlines()[0]
    assert safetensors_file.MAX_HEADER_BYTES == 8 << 20
    assert safetensors_file.MAX_TENSORS == 65_536
    assert (safetensors_file.MAX_RANK, safetensors_file.MAX_NAME_CHARS) == (8, 256)
    assert (layout.MATRIX_ALIGNMENT_BYTES, layout.SECTION_ALIGNMENT_BYTES) == (256, 16)
    assert f"blocks of {BLOCK_ELEMENTS:,}" in DOC
    assert parts.MAX_SHARD_BYTES == 5_000_000_000


def test_the_printed_block_is_that_of_the_printed_elements():
    example = only_json("coded")
    base, tuned = (
        slice_elements(read_words(example[key]).view(torch.bfloat16)) for key in ("base", "element")
    )
    (block,) = encode_blocks("BF16", 5, tuned, base=base, n_predicted=5)
    assert block == bytes(dump("coded"))


def test_the_printed_block_can_be_read_with_the_page_alone():
    example, raw = only_json("coded"), bytes(dump("coded"))
    old, new = ([int(text, 16) for text in example[key]] for key in ("base", "element"))
    rising = [
        [bits ^ 0xFFFF if bits >> 15 else bits + 0x8000 for bits in side] for side in (new, old)
    ]
    difference = [a - b for a, b in zip(*rising, strict=True)]
    order = sorted(range(5), key=lambda at: old[at] >> 7 & 0xFF)
    words = [2 * d if d >= 0 else -2 * d - 1 for d in (difference[at] for at in order)]
    assert (difference, order) == (example["difference"], example["order"])
    assert [f"{word:04x}" for word in words] == example["word"]
    planes, at = [], 1
    for _ in range(2):
        (size,) = struct.unpack_from("<I", raw, at)
        planes.append(zstandard.decompress(raw[at + 4 : at + 4 + size]))
        at += 4 + size
    assert (raw[0], at) == (2, len(raw))
    assert [low + 256 * high for low, high in zip(*planes, strict=True)] == words


ROUNDED = [json.loads(text) for text in blocks("json rounded")]


def test_every_scheme_has_an_example():
    assert {example["scheme"] for example in ROUNDED} == set(SCHEMES)


@pytest.mark.parametrize("example", ROUNDED, ids=lambda example: example["scheme"])
def test_a_row_of_the_backbone_is_rounded_to_the_printed_values(example):
    row = torch.tensor([example["row"]]).to(TORCH_DTYPES[example["dtype"]])
    assert round_values(row, SCHEMES[example["scheme"]]).tolist() == [example["value"]]
