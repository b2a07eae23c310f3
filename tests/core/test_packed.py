from dataclasses import replace

import pytest
import torch
from factories_core import factorise, pack_rows, quantise, spread

from deltacome_core.bitpack import pack_codes
from deltacome_core.errors import InternalError
from deltacome_core.layout import PLANES, RankBand, scale_shape
from deltacome_core.packed import PackedFactor

GROUPS = [(1, 128), (128, 1), (0, 1), (1, 0), (0, 0), (3, 50)]


def make_factor(bits, group, *, symmetric, rows=7, cols=133):
    generator = torch.Generator().manual_seed(bits)
    grid = scale_shape(rows, cols, group)
    codes = torch.randint(0, 1 << bits, (rows, cols), generator=generator, dtype=torch.uint8)
    scale = torch.rand(grid, generator=generator).half()
    zero = torch.randint(0, 1 << bits, grid, generator=generator, dtype=torch.uint8)
    factor = PackedFactor(
        codes=pack_codes(codes, bits),
        scale=scale,
        zero=None if symmetric else zero,
        bits=bits,
        rows=rows,
        cols=cols,
        group=group,
    )
    return factor, codes, zero


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_value_is_code_minus_zero_times_scale(bits, group, symmetric):
    factor, codes, zero = make_factor(bits, group, symmetric=symmetric)
    offset = (2**bits - 1) / 2 if symmetric else spread(zero.float(), codes.shape, group)
    expected = (codes.float() - offset) * spread(factor.scale.float(), codes.shape, group)
    assert torch.equal(factor.dequantise(), expected)


def test_a_matrix_is_the_sum_of_its_bands():
    delta = torch.randn((40, 60), generator=torch.Generator().manual_seed(3))
    matrix = factorise("w", delta, (RankBand(8, 3), RankBand(4, 5)))
    expected = torch.zeros(40, 60)
    start = 0
    for band in matrix.bands:
        sigma = torch.diag(matrix.sigma[start : start + band.rank])
        expected += band.u.dequantise() @ sigma @ band.v.dequantise()
        start += band.rank
    torch.testing.assert_close(matrix.dequantise(), expected)
    left, right = matrix.factors()
    assert left.shape == (40, 8)
    assert right.shape == (8, 60)
    assert matrix.rank_bands == (RankBand(8, 3), RankBand(4, 5))


def test_eight_bits_at_full_rank_restore_the_delta():
    delta = torch.randn((24, 24), generator=torch.Generator().manual_seed(4))
    matrix = factorise("w", delta, (RankBand(8, 24),))
    error = (matrix.dequantise() - delta).norm() / delta.norm()
    # A code is off by at most half a step of 1/255 of a vector's range, twice: measured 0.0067.
    assert error < 0.013


def test_rows_are_zero_where_nothing_changed():
    base = torch.randn((9, 20), generator=torch.Generator().manual_seed(5))
    tuned = base.clone()
    tuned[4] += 1
    rows = pack_rows("e", base, tuned, bits=8)
    delta = rows.dequantise()
    assert rows.changed.nonzero().tolist() == [[4]]
    assert torch.count_nonzero(delta[:4]) == 0
    torch.testing.assert_close(delta[4], torch.ones(20), atol=0.01, rtol=0)


def test_size_counts_every_array():
    factor = quantise(torch.ones((4, 130)), 2, (1, 128))
    assert factor.size_bytes == 4 * 9 * 4 + 4 * 2 * 2 + 4 * 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"cols": 200},
        {"rows": 8},
        {"bits": 3},
        {"group": (1, 64)},
        {"scale": torch.ones(7, 2)},
        {"zero": torch.zeros((7, 2), dtype=torch.int32)},
    ],
)
def test_a_factor_whose_arrays_disagree_cannot_be_made(wrong):
    factor, _, _ = make_factor(2, (1, 128), symmetric=False)
    with pytest.raises(InternalError):
        replace(factor, **wrong)


def test_bands_and_rows_that_disagree_cannot_be_made():
    matrix = factorise("w", torch.eye(40), (RankBand(2, 2),))
    with pytest.raises(InternalError):
        replace(matrix, sigma=torch.ones(3))
    with pytest.raises(InternalError):
        replace(matrix, in_features=41)
    with pytest.raises(InternalError):
        replace(matrix.bands[0], u=quantise(torch.ones((40, 3)), 2, (1, 128)))
    rows = pack_rows("e", torch.zeros((4, 8)), torch.ones((4, 8)))
    with pytest.raises(InternalError):
        replace(rows, changed=torch.zeros(4, dtype=torch.bool))
