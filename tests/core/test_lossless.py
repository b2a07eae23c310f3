"""A coded tensor comes back bit for bit, and bytes that no writer made are refused."""

import hashlib
import random
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
import zstandard

from deltacome_core import lossless
from deltacome_core.entries import CodedEntry
from deltacome_core.errors import InternalError, UserError
from deltacome_core.lossless import (
    MODE_DIFFERENCE,
    MODE_PLAIN,
    MODE_XOR,
    decode_blocks,
    decode_tensor,
    encode_blocks,
    plan_blocks,
    slice_elements,
)
from deltacome_core.packed import CodedTensor
from deltacome_core.tensors import TORCH_DTYPES, dtype_name, tensor_bytes

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def bits(dtype, shape, seed=0):
    """Any bit pattern at all: NaN with payloads, infinities, both zeros, subnormals."""
    item_bytes = TORCH_DTYPES[dtype].itemsize
    raw = random.Random(seed).randbytes(prod(shape) * item_bytes)
    if dtype == "BOOL":
        raw = bytes(byte & 1 for byte in raw)
    flat = torch.tensor(list(raw), dtype=torch.uint8)
    return flat.view(TORCH_DTYPES[dtype]).reshape(shape)


def weights(dtype, shape, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    return values.to(TORCH_DTYPES[dtype])


def tune(base, seed=1, size=0.002):
    return (base.float() + size * weights("F32", base.shape, seed)).to(base.dtype)


def encode(tuned, base=None, *, base_rows=None):
    rows = tuned.shape[0] if tuned.ndim else 1
    base_rows = (0 if base is None else rows) if base_rows is None else base_rows
    raw = b"".join(
        encode_blocks(
            dtype_name(tuned.dtype),
            tuned.numel(),
            slice_elements(tuned),
            base=None if base is None else slice_elements(base),
            n_predicted=base_rows * prod(tuned.shape[1:]),
        )
    )
    return hold(raw, tuned, base_rows=base_rows)


def hold(raw, tuned, *, base_rows):
    entry = CodedEntry(
        name="w",
        dtype=dtype_name(tuned.dtype),
        shape=tuple(tuned.shape),
        base_rows=base_rows,
        size_bytes=len(raw),
        sha256=hashlib.sha256(tensor_bytes(tuned)).hexdigest(),
    )
    return CodedTensor(entry=entry, read=lambda start, size: memoryview(raw)[start : start + size])


def raw_of(coded):
    return b"".join(coded.chunks())


def same_bits(one, other):
    return one.dtype == other.dtype and bytes(tensor_bytes(one)) == bytes(tensor_bytes(other))


@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPES))
@pytest.mark.parametrize("shape", [(7, 33), (1,), (), (0, 4), (3, 5, 8)])
def test_any_bits_of_any_type_come_back(dtype, shape):
    tuned, base = bits(dtype, shape), bits(dtype, shape, seed=1)
    for grown_from in (None, base, tuned):
        coded = encode(tuned, grown_from)
        assert same_bits(decode_tensor(coded, grown_from), tuned)
        assert coded.size_bytes == len(raw_of(coded))


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_pair_of_special_numbers_comes_back(dtype):
    specials = [0.0, -0.0, 1.0, -1.0, 2.0**-9, -(2.0**-9), float("nan"), 448.0, -448.0]
    values = torch.tensor(specials, dtype=torch.float64).to(TORCH_DTYPES[dtype])
    one, other = values.repeat(len(values)), values.repeat_interleave(len(values))
    assert same_bits(decode_tensor(encode(one, other), other), one)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_fine_tune_is_coded_as_a_difference_and_smaller_than_alone(dtype):
    base = weights(dtype, (200, 300))
    tuned = tune(base)
    near, alone = encode(tuned, base), encode(tuned)
    assert raw_of(near)[0] == MODE_DIFFERENCE
    assert raw_of(alone)[0] == MODE_PLAIN
    assert near.size_bytes < 0.8 * alone.size_bytes


def test_the_smallest_of_three_is_kept():
    base = torch.arange(10_000, dtype=torch.int32)
    assert raw_of(encode(base ^ 1, base))[0] == MODE_XOR
    constant = torch.zeros(10_000, dtype=torch.bfloat16)
    assert raw_of(encode(constant, weights("BF16", (10_000,))))[0] == MODE_PLAIN


@pytest.mark.parametrize(
    ("tuned_dtype", "base_dtype"), [("F32", "BF16"), ("BF16", "F32"), ("F16", "BF16")]
)
def test_a_base_of_another_type_is_cast_first(tuned_dtype, base_dtype):
    base = weights(base_dtype, (40, 50))
    tuned = tune(base.to(TORCH_DTYPES[tuned_dtype]))
    assert same_bits(decode_tensor(encode(tuned, base), base), tuned)
    cast = base.to(TORCH_DTYPES[tuned_dtype])
    assert raw_of(encode(tuned, base)) == raw_of(encode(tuned, cast))


def test_rows_the_base_lacks_are_coded_alone(monkeypatch):
    monkeypatch.setattr(lossless, "BLOCK_ELEMENTS", 1000)
    base = weights("BF16", (64, 48))
    tuned = torch.cat([tune(base), weights("BF16", (5, 48), seed=9)])
    coded = encode(tuned, base, base_rows=64)
    assert same_bits(decode_tensor(coded, base), tuned)


def test_blocks_cover_the_tensor_once_and_stay_on_one_side(monkeypatch):
    monkeypatch.setattr(lossless, "BLOCK_ELEMENTS", 10)
    blocks = [(block.start, block.stop, block.is_predicted) for block in plan_blocks(34, 25)]
    assert blocks == [(0, 10, True), (10, 20, True), (20, 25, True), (25, 34, False)]


def test_a_tensor_is_read_and_written_a_block_at_a_time(monkeypatch):
    monkeypatch.setattr(lossless, "BLOCK_ELEMENTS", 100)
    base = weights("BF16", (1000,))
    tuned = tune(base)
    asked = []

    def read(start, stop):
        asked.append((start, stop))
        return tuned[start:stop]

    blocks = encode_blocks("BF16", 1000, read, base=slice_elements(base), n_predicted=1000)
    next(blocks)
    assert asked == [(0, 100)]
    chunks = [len(chunk) for chunk in decode_blocks(encode(tuned, base), slice_elements(base))]
    assert sum(chunks) == 2000
    assert max(chunks) == 200


def test_the_same_tensor_gives_the_same_bytes():
    base = weights("BF16", (300, 300))
    tuned = tune(base)
    assert raw_of(encode(tuned, base)) == raw_of(encode(tuned.clone(), base.clone()))


def test_the_page_alone_is_enough_to_decode_a_difference():
    base = weights("BF16", (31, 17))
    tuned = tune(base)
    raw = raw_of(encode(tuned, base))
    assert raw[0] == 2
    at, planes = 1, []
    for _ in range(2):
        size = int.from_bytes(raw[at : at + 4], "little")
        planes.append(zstandard.decompress(raw[at + 4 : at + 4 + size]))
        at += 4 + size
    assert at == len(raw)
    words = [low | high << 8 for low, high in zip(*planes, strict=True)]
    old = base.reshape(-1).view(torch.int16).numpy().astype(np.uint16).tolist()
    order = sorted(range(len(old)), key=lambda k: (old[k] >> 7) & 0xFF)

    def rising(word):
        return 0xFFFF - word if word & 0x8000 else word + 0x8000

    restored = [0] * len(old)
    for word, k in zip(words, order, strict=True):
        difference = -(word + 1) // 2 if word & 1 else word // 2
        moved = (rising(old[k]) + difference) % 0x10000
        restored[k] = moved - 0x8000 if moved & 0x8000 else 0xFFFF - moved
    assert restored == tuned.reshape(-1).view(torch.int16).numpy().astype(np.uint16).tolist()


@pytest.fixture
def pair():
    base = weights("BF16", (20, 30))
    return base, tune(base)


def refuse(coded, base):
    with pytest.raises(UserError) as caught:
        decode_tensor(coded, base)
    assert caught.value.code == "delta_invalid"
    return caught.value.params["reason"]


def frames(n_bytes, *, announce=True, level=1):
    compressor = zstandard.ZstdCompressor(level=level, write_content_size=announce)
    frame = compressor.compress(bytes(n_bytes))
    return len(frame).to_bytes(4, "little") + frame


def test_every_cut_is_refused(pair):
    base, tuned = pair
    raw = raw_of(encode(tuned, base))
    for size in (0, 1, 3, 5, 9, len(raw) // 2, len(raw) - 1):
        assert "cut short" in refuse(hold(raw[:size], tuned, base_rows=20), base)


def test_bytes_behind_the_last_block_are_refused(pair):
    base, tuned = pair
    raw = raw_of(encode(tuned, base))
    assert "follow" in refuse(hold(raw + b"\0", tuned, base_rows=20), base)


def test_no_changed_byte_goes_unnoticed(pair):
    base, tuned = pair
    raw = raw_of(encode(tuned, base))
    for at in range(0, len(raw), 7):
        broken = bytearray(raw)
        broken[at] ^= 0x41
        assert refuse(hold(bytes(broken), tuned, base_rows=20), base)


def test_a_frame_that_announces_another_size_is_refused_before_it_is_decoded(pair, monkeypatch):
    base, tuned = pair

    def decompress(*_args, **_options):
        raise AssertionError("decoded")

    monkeypatch.setattr(zstandard, "ZstdDecompressor", decompress)
    for frame in (frames(1 << 30), frames(599), frames(601), frames(600, announce=False)):
        assert "announces" in refuse(hold(b"\2" + frame + frames(600), tuned, base_rows=20), base)


def test_an_unknown_mode_or_one_without_its_base_is_refused(pair):
    base, tuned = pair
    whole = frames(600) + frames(600)
    assert "mode 3" in refuse(hold(b"\3" + whole, tuned, base_rows=20), base)
    assert "mode 2" in refuse(hold(b"\2" + whole, tuned, base_rows=0), None)
    numbers = torch.zeros((20, 30), dtype=torch.int16)
    assert "mode 2" in refuse(hold(b"\2" + whole, numbers, base_rows=20), numbers)


def test_a_frame_with_something_behind_it_is_refused(pair):
    base, tuned = pair
    frame = zstandard.ZstdCompressor(level=1).compress(bytes(600)) + b"more"
    raw = b"\2" + len(frame).to_bytes(4, "little") + frame + frames(600)
    assert "cannot be decoded" in refuse(hold(raw, tuned, base_rows=20), base)


def test_a_frame_to_be_skipped_is_refused(pair):
    base, tuned = pair
    skipped = b"\x50\x2a\x4d\x18" + (600).to_bytes(4, "little") + bytes(600)
    raw = b"\2" + len(skipped).to_bytes(4, "little") + skipped + frames(600)
    assert refuse(hold(raw, tuned, base_rows=20), base)


def test_another_digest_is_refused_before_the_last_block_is_given(pair, monkeypatch):
    monkeypatch.setattr(lossless, "BLOCK_ELEMENTS", 100)
    base, tuned = pair
    coded = encode(tuned, base)
    wrong = replace(coded, entry=replace(coded.entry, sha256="0" * 64))
    given = []
    with pytest.raises(UserError, match="sha256"):
        given.extend(len(chunk) for chunk in decode_blocks(wrong, slice_elements(base)))
    assert sum(given) == 1000


def test_another_base_is_refused(pair):
    base, tuned = pair
    assert "sha256" in refuse(encode(tuned, base), base + 1)


def test_a_base_that_is_needed_must_be_given(pair):
    base, tuned = pair
    with pytest.raises(InternalError):
        decode_tensor(encode(tuned, base), None)
