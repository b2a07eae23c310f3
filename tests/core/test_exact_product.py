"""The product that defines a reconstruction has one value, whoever computes it."""

import hashlib
import math
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from factories_core import factorise

from deltacome_core.errors import InternalError
from deltacome_core.exact_product import EXACT_BITS, grid_bits, multiply_factors, round_to_grid
from deltacome_core.layout import RankBand

HASH_A_PRODUCT = """
import hashlib, sys, torch
torch.set_num_threads(int(sys.argv[1]))
from deltacome_core.exact_product import multiply_factors
generator = torch.Generator().manual_seed(7)
left = torch.randn((131, 200), generator=generator).double()
right = torch.randn((200, 259), generator=generator).double()
print(hashlib.sha256(multiply_factors(left, right).numpy().tobytes()).hexdigest())
"""


def make_factors(out=131, rank=200, inn=259, seed=7):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn((out, rank), generator=generator).double()
    return left, torch.randn((rank, inn), generator=generator).double()


def whole_numbers(rows, bits):
    """Round a matrix with fractions, from the page alone."""
    values = [[Fraction(value) for value in row] for row in rows]
    largest = max(abs(value) for row in values for value in row)
    power = math.frexp(float(largest))[1] - bits
    # round() of a fraction takes halves to even.
    return [[round(value / Fraction(2) ** power) for value in row] for row in values], power


def product_by_the_page(left, right):
    rank = len(right)
    bits = 53 - math.ceil(math.log2(rank))
    whole_left, power_left = whole_numbers(left, bits // 2)
    whole_right, power_right = whole_numbers(right, bits - bits // 2)
    step = Fraction(2) ** (power_left + power_right)
    columns = list(zip(*whole_right, strict=True))
    sums = [
        [sum(a * b for a, b in zip(row, col, strict=True)) for col in columns] for row in whole_left
    ]
    assert all(abs(value) <= 2**53 for row in sums for value in row)
    return torch.tensor([[float(value * step) for value in row] for row in sums]).float()


@pytest.mark.parametrize("rank", [1, 2, 3, 17])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 3e9])
def test_the_product_is_that_of_python_integers(rank, scale):
    left, right = make_factors(9, rank, 7, seed=rank)
    right = (right * scale * torch.logspace(0, -3, rank)[:, None]).double()
    expected = product_by_the_page(left.tolist(), right.tolist())
    assert torch.equal(multiply_factors(left, right), expected)


def test_a_half_is_rounded_to_even():
    whole, power = round_to_grid(torch.tensor([3.5, 2.5, 1.5, -0.5, -1.5]).double(), 2)
    assert (whole.tolist(), power) == ([4.0, 2.0, 2.0, 0.0, -2.0], 0)


@pytest.mark.parametrize("rank", [1, 2, 3, 128, 129, 4096, 2**20])
def test_no_partial_sum_can_leave_the_whole_numbers_of_float64(rank):
    bits_u, bits_v = grid_bits(rank)
    assert rank * 2**bits_u * 2**bits_v <= 2**EXACT_BITS
    assert rank * 2**bits_u * 2**bits_v > 2 ** (EXACT_BITS - 1)
    largest = torch.tensor([1.0, 1.0 - 2.0**-53, -1.0, 2.0 - 2.0**-52]).double()
    for value in largest:
        whole, _ = round_to_grid(value.reshape(1), bits_u)
        assert abs(float(whole)) <= 2**bits_u


def test_the_worst_case_of_the_bound_is_summed_without_an_error():
    rank = 4096
    left = torch.full((1, rank), 2.0 - 2.0**-52).double()
    right = torch.full((rank, 1), 2.0 - 2.0**-52).double()
    # Both factors round up to the largest whole number, so the sum is 2^53 itself.
    assert float(multiply_factors(left, right)) == 4 * rank


def test_neither_order_nor_blocks_nor_transposition_change_a_bit():
    left, right = make_factors()
    expected = multiply_factors(left, right)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert torch.equal(multiply_factors(left[:, order], right[order]), expected)
    bits_u, bits_v = grid_bits(200)
    P, power_u = round_to_grid(left, bits_u)
    Q, power_v = round_to_grid(right, bits_v)
    step = math.ldexp(1.0, power_u + power_v)
    blocked = sum(P[:, start : start + 7] @ Q[start : start + 7] for start in range(0, 200, 7))
    one_by_one = torch.stack([(P * Q[:, col]).sum(dim=1) for col in range(259)], dim=1)
    integers = P.long() @ Q.long()
    for other in (blocked, one_by_one, (Q.T @ P.T).T, integers.double()):
        assert torch.equal((other * step).float(), expected)


def test_large_results_are_made_in_blocks_of_rows(monkeypatch):
    left, right = make_factors()
    expected = multiply_factors(left, right)
    monkeypatch.setattr("deltacome_core.exact_product._BLOCK_ELEMENTS", 1000)
    assert torch.equal(multiply_factors(left, right), expected)


@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_threads_do_not_change_a_bit(threads):
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "-c", HASH_A_PRODUCT, threads],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    here = multiply_factors(*make_factors()).numpy().tobytes()
    assert done.stdout.strip() == hashlib.sha256(here).hexdigest()


def test_the_product_is_near_the_true_one():
    delta = torch.randn((300, 400), generator=torch.Generator().manual_seed(2))
    matrix = factorise("w", delta, (RankBand(8, 40), RankBand(2, 60)))
    left, right = matrix.factors()
    truth = left.double() @ right.double()
    # 46 bits for rank 100: a step of 2^-23 of the largest value on each side, measured below.
    assert (matrix.dequantise() - truth).norm() < 2e-6 * truth.norm()


def test_nothing_changes_nothing():
    zero = torch.zeros((3, 2)).double()
    assert not multiply_factors(zero, zero.T).any()


def test_factors_of_another_type_are_refused():
    with pytest.raises(InternalError):
        multiply_factors(torch.ones((2, 2)), torch.ones((2, 2)).double())
