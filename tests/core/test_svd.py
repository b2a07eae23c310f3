import numpy as np
import pytest
import torch

from deltacome_core.svd import truncated_svd


def draw(rows: int, cols: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (80, 80), (33, 200)])
def test_truncation_is_as_good_as_the_optimum(shape):
    delta = draw(*shape)
    rank = min(shape) // 3
    left, sigma, right = truncated_svd(delta, rank)
    exact = np.linalg.svd(delta.double().numpy(), compute_uv=False)
    optimum = np.sqrt((exact[rank:] ** 2).sum())
    error = torch.linalg.norm(delta.double() - (left * sigma).double() @ right.double()).item()
    assert error == pytest.approx(optimum, rel=1e-5)
    np.testing.assert_allclose(sigma.numpy(), exact[:rank], rtol=1e-5)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_factors_are_orthonormal(shape):
    left, _, right = truncated_svd(draw(*shape), 20)
    identity = torch.eye(20)
    assert torch.allclose(left.T @ left, identity, atol=1e-5)
    assert torch.allclose(right @ right.T, identity, atol=1e-5)


def test_full_rank_gives_the_delta_back():
    delta = draw(48, 40)
    left, sigma, right = truncated_svd(delta, 40)
    assert torch.allclose((left * sigma) @ right, delta, atol=1e-5)


def test_directions_beyond_the_true_rank_are_zero():
    delta = draw(64, 3) @ draw(3, 72, seed=1)
    left, sigma, right = truncated_svd(delta, 8)
    assert torch.count_nonzero(sigma) == 3
    assert not right[3:].any()
    assert not left[:, 3:].any()
    assert torch.allclose((left * sigma) @ right, delta, atol=1e-4)


def test_a_zero_delta_has_only_zero_factors():
    left, sigma, right = truncated_svd(torch.zeros(40, 50), 5)
    assert not sigma.any()
    assert torch.isfinite(left).all()
    assert not right.any()


def test_a_delta_of_tiny_numbers_keeps_its_directions():
    delta = draw(64, 48) * 1e-12
    left, sigma, right = truncated_svd(delta, 48)
    assert torch.allclose((left * sigma) @ right, delta, rtol=0, atol=1e-17)


def test_the_same_delta_gives_the_same_bytes():
    first, second = truncated_svd(draw(64, 64), 9), truncated_svd(draw(64, 64), 9)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_long_tail_is_decomposed_as_the_library_does_it():
    strengths = torch.arange(1, 161, dtype=torch.float32) ** -0.6
    delta = torch.linalg.qr(draw(160, 160)).Q * strengths @ torch.linalg.qr(draw(320, 160)).Q.T
    left, sigma, right = truncated_svd(delta, 80)
    truth = torch.linalg.svd(delta.double(), full_matrices=False)
    assert torch.allclose(sigma.double(), truth.S[:80], rtol=1e-6)
    for ours, theirs in ((left.T, truth.U[:, :80].T), (right, truth.Vh[:80])):
        cosines = (ours.double() * theirs).sum(dim=1).abs()
        assert torch.allclose(cosines, torch.ones(80, dtype=torch.float64), atol=1e-6)
