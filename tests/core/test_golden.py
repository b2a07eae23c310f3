"""Deltas written by format version 1 must stay readable, number for number, byte for byte."""

import golden
import pytest
import torch

from deltacome_core.container import open_delta
from deltacome_core.inspection import inspect_delta
from deltacome_core.layout import RankBand
from deltacome_core.packed import CodedTensor, ExactTensor
from deltacome_core.reconstruct import apply_entry

VARIANTS = sorted(golden.VARIANTS)


def value_at(row, col, rows, cols, bits, group, *, symmetric):
    """What the specification says the code at (row, col) of a golden factor stands for."""
    group_rows, group_cols = group[0] or rows, group[1] or cols
    at = (row // group_rows, col // group_cols)
    zero = (2**bits - 1) / 2 if symmetric else golden.zero_at(*at, bits)
    return (golden.code_at(row, col, bits) - zero) * golden.scale_at(*at)


def stated_factor(rows, cols, bits, group, *, symmetric):
    return torch.tensor(
        [
            [
                value_at(row, col, rows, cols, bits, group, symmetric=symmetric)
                for col in range(cols)
            ]
            for row in range(rows)
        ]
    )


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture
def delta(variant):
    return open_delta(golden.ROOT / variant)


def check_matrix(matrix, variant, shape, piece=0):
    symmetric, group_u, group_v = golden.VARIANTS[variant]
    out, inn, bands = shape
    assert matrix.rank_bands == tuple(RankBand(*band) for band in bands)
    assert matrix.sigma.tolist() == [golden.sigma_at(index, piece) for index in range(matrix.rank)]
    for band, (bits, rank) in zip(matrix.bands, bands, strict=True):
        u = stated_factor(out, rank, bits, group_u, symmetric=symmetric)
        v = stated_factor(rank, inn, bits, group_v, symmetric=symmetric)
        assert torch.equal(band.u.dequantise(), u)
        assert torch.equal(band.v.dequantise(), v)


@pytest.mark.parametrize("name", sorted(golden.DIRECT))
def test_a_golden_direct_matrix_decodes_to_the_stated_numbers(delta, variant, name):
    symmetric, group = golden.VARIANTS[variant][0], golden.DIRECT_GROUPS[variant]
    out, inn, bits = golden.DIRECT[name]
    stated = stated_factor(out, inn, bits, group, symmetric=symmetric)
    assert torch.equal(delta.load(name).dequantise(), stated)


@pytest.mark.parametrize("name", sorted(golden.MATRICES))
def test_a_golden_matrix_decodes_to_the_stated_numbers(delta, variant, name):
    check_matrix(delta.load(name), variant, golden.MATRICES[name])


@pytest.mark.parametrize("name", sorted(golden.STACKS))
def test_each_slice_of_a_golden_stack_decodes_to_the_stated_numbers(delta, variant, name):
    shape, _, transposed = golden.STACKS[name]
    stack = delta.load(name)
    for piece, matrix in enumerate(stack.slices):
        check_matrix(matrix, variant, golden.matrix_shape(name), piece)
    whole = stack.dequantise()
    assert tuple(whole.shape) == shape
    for matrix, part in zip(stack.slices, whole.view(-1, *shape[-2:]), strict=True):
        delta_of_slice = matrix.dequantise()
        assert torch.equal(part, delta_of_slice.T if transposed else delta_of_slice)


def test_golden_rows_decode_to_the_stated_numbers(delta, variant):
    symmetric, _, group = golden.VARIANTS[variant]
    rows = delta.load(golden.EMBED)
    assert rows.changed.nonzero().flatten().tolist() == list(golden.CHANGED)
    stated = stated_factor(len(golden.CHANGED), golden.COLS, 4, group, symmetric=symmetric)
    assert torch.equal(rows.dequantise()[list(golden.CHANGED)], stated)
    assert torch.count_nonzero(rows.dequantise()[[1, 2, 4, 5, 6, 7, 9]]) == 0
    new = [golden.exact_at(index) for index in range(golden.NEW_ROWS * golden.COLS)]
    expected = torch.tensor(new).to(torch.bfloat16).tolist()
    assert rows.new_rows.flatten().tolist() == expected


def test_golden_exact_and_unchanged_tensors_are_as_stated(delta):
    norm = delta.load(golden.NORM)
    assert isinstance(norm, ExactTensor)
    assert norm.value.tolist() == [golden.exact_at(index) for index in range(golden.COLS)]
    assert delta.load(golden.FINAL_NORM) is None


def test_the_same_content_is_written_to_the_same_bytes(variant, tmp_path):
    golden.write_golden(tmp_path / variant, variant)
    stored = sorted((golden.ROOT / variant).iterdir())
    assert [path.name for path in stored] == ["config.json", "delta.json", "delta.safetensors"]
    for path in stored:
        assert (tmp_path / variant / path.name).read_bytes() == path.read_bytes()


def test_the_golden_lossless_delta_decodes_to_the_stated_numbers():
    delta = open_delta(golden.ROOT / "lossless")
    base, tuned = golden.make_pair()
    for name, expected in tuned.items():
        entry, packed = delta.entries[name], delta.load(name)
        assert isinstance(packed, CodedTensor)
        assert entry.base_rows == (golden.BASE_ROWS if name in base else 0)
        assert torch.equal(apply_entry(base.get(name), packed), expected)


def test_the_golden_folders_stay_small():
    folders = [golden.ROOT / name for name in (*VARIANTS, "lossless")]
    total = sum(inspect_delta(folder).total_bytes for folder in folders)
    assert total < 64 << 10
