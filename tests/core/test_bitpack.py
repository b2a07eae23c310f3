import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltacome_core.bitpack import PLANES, pack_codes, unpack_codes, used_bits, words_per_row
from deltacome_core.errors import InternalError


def pack_row_by_the_book(codes, bits):
    """The sentence of docs/format.md, one code at a time, in plain Python."""
    words = []
    for start in range(0, len(codes), 128):
        tile = codes[start : start + 128]
        shift = 0
        for width in PLANES[bits]:
            n_words = -(-len(tile) * width // 32)
            plane = [0] * n_words
            for k, code in enumerate(tile):
                field = (code >> shift) & ((1 << width) - 1)
                plane[k % n_words] |= field << (width * (k // n_words))
            words += plane
            shift += width
    return words


def as_unsigned(words):
    return [word & 0xFFFFFFFF for word in words.tolist()]


@st.composite
def rows_of_codes(draw):
    bits = draw(st.sampled_from(sorted(PLANES)))
    rows = draw(st.integers(1, 3))
    n = draw(st.one_of(st.integers(1, 300), st.sampled_from([127, 128, 129, 256, 1002])))
    seed = draw(st.integers(0, 2**31))
    codes = torch.randint(0, 1 << bits, (rows, n), generator=torch.Generator().manual_seed(seed))
    return codes.to(torch.uint8), bits


@settings(max_examples=150, deadline=None)
@given(rows_of_codes())
def test_packing_follows_the_book_and_unpacks_to_itself(case):
    codes, bits = case
    words = pack_codes(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (len(codes), words_per_row(codes.shape[1], bits))
    for row, packed in zip(codes.tolist(), words, strict=True):
        assert as_unsigned(packed) == pack_row_by_the_book(row, bits)
    assert torch.equal(unpack_codes(words, bits, codes.shape[1]), codes)


@pytest.mark.parametrize(("bits", "words"), [(1, 4), (2, 8), (3, 12), (4, 16), (8, 32)])
def test_a_full_tile_wastes_nothing(bits, words):
    assert words_per_row(128, bits) == words
    assert as_unsigned(used_bits(128, bits)) == [0xFFFFFFFF] * words


def test_field_j_of_word_i_holds_code_8j_plus_i():
    codes = torch.zeros((1, 128), dtype=torch.uint8)
    codes[0, 8 * 5 + 3] = 2
    words = as_unsigned(pack_codes(codes, 2)[0])
    assert words == [0, 0, 0, 2 << (2 * 5), 0, 0, 0, 0]


@pytest.mark.parametrize("bits", sorted(PLANES))
@pytest.mark.parametrize("n", [1, 15, 16, 17, 127, 130])
def test_the_used_bits_are_as_many_as_the_codes_have(bits, n):
    assert sum(word.bit_count() for word in as_unsigned(used_bits(n, bits))) == n * bits


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_empty_factors_pack_to_nothing(shape):
    words = pack_codes(torch.zeros(shape, dtype=torch.uint8), 3)
    assert words.numel() == 0
    assert unpack_codes(words, 3, shape[1]).shape == shape


def test_long_inputs_are_packed_in_blocks_with_the_same_result(monkeypatch):
    codes = torch.arange(40 * 200).reshape(40, 200) % 8
    whole = pack_codes(codes, 3)
    monkeypatch.setattr("deltacome_core.bitpack._BLOCK_CODES", 1000)
    assert torch.equal(pack_codes(codes, 3), whole)
    assert torch.equal(unpack_codes(whole, 3, 200), codes.to(torch.uint8))


def test_a_real_factor_has_the_same_bytes_everywhere():
    codes = (torch.arange(4096)[:, None] * 7 + torch.arange(1002) * 3) % 4
    words = pack_codes(codes, 2)
    digest = hashlib.sha256(words.numpy().astype("<i4").tobytes()).hexdigest()
    assert digest == "1b2d1979727745a4d75cdc1f748b0ef019daf57b11e0dea506b31c8ae7eb8be2"


@pytest.mark.parametrize("code", [-1, 4, 255])
def test_a_code_that_does_not_fit_is_our_error(code):
    with pytest.raises(InternalError):
        pack_codes(torch.tensor([[0, code]]), 2)


def test_words_of_another_width_are_our_error():
    with pytest.raises(InternalError):
        unpack_codes(torch.zeros((2, 9), dtype=torch.int32), 2, 128)
