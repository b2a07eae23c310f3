import pytest
import torch

from deltacome_core.bands import plan_bands
from deltacome_core.errors import InternalError
from deltacome_core.factorise import NamedDelta, factorise_matrices
from deltacome_core.recipe import get_recipe

CPU = torch.device("cpu")
COME = get_recipe("come", matrix_bits=2.0)


def draw(rows, cols, *, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def long_tailed(rows, cols, *, seed=0):
    """A delta whose singular values fall as those of real fine-tunes do."""
    rank = min(rows, cols)
    left = torch.linalg.qr(draw(rows, rank, seed=seed)).Q
    right = torch.linalg.qr(draw(cols, rank, seed=seed + 1)).Q
    return (left * torch.arange(1, rank + 1) ** -0.8) @ right.T


def correlated_hessian(cols):
    tokens = draw(4 * cols, cols, seed=9) @ (
        draw(cols, cols, seed=8) * 0.1 + torch.diag(torch.arange(1, cols + 1) ** -0.5)
    )
    return tokens.T @ tokens / tokens.shape[0]


def output_error(packed, delta, hessian):
    error = (packed.dequantise() - delta).double()
    return torch.einsum("oi,ij,oj->", error, hessian.double(), error).item()


def test_calibration_lowers_the_output_error():
    delta, hessian = long_tailed(192, 256), correlated_hessian(256)
    source = [NamedDelta(name="w", delta=delta)]
    (with_hessian,) = factorise_matrices(source, COME, hessian=hessian)
    (without,) = factorise_matrices(source, COME, hessian=None)
    calibrated = output_error(with_hessian.packed, delta, hessian)
    assert calibrated < 0.8 * output_error(without.packed, delta, hessian)


def test_data_free_has_a_lower_weight_error_than_plain_rounding():
    source = [NamedDelta(name="w", delta=long_tailed(192, 256))]
    (plain,) = factorise_matrices(source, COME, hessian=None)
    free = get_recipe("datafree", matrix_bits=2.0)
    (clipped,) = factorise_matrices(source, free, hessian=None)
    assert clipped.relative_error < 0.95 * plain.relative_error


def test_data_free_keeps_the_strength_of_each_direction():
    """Clipping shrinks; a shrunken delta is a weaker fine-tune whatever its squared error."""
    delta = long_tailed(192, 256)
    free = get_recipe("datafree", matrix_bits=1.0)
    (made,) = factorise_matrices([NamedDelta(name="w", delta=delta)], free, hessian=None)
    left, sigma, right = torch.linalg.svd(delta)
    rank = made.packed.rank
    strength = torch.einsum("or,oi,ri->r", left[:, :rank], made.packed.dequantise(), right[:rank])
    assert strength.sum() / sigma[:rank].sum() == pytest.approx(1.0, abs=0.02)


def test_matrices_of_one_input_come_out_as_if_alone():
    hessian = correlated_hessian(128)
    sources = [NamedDelta(name=n, delta=long_tailed(96, 128, seed=i)) for i, n in enumerate("qkv")]
    together = factorise_matrices(sources, COME, hessian=hessian)
    for source, joint in zip(sources, together, strict=True):
        (alone,) = factorise_matrices([source], COME, hessian=hessian)
        assert joint.packed.name == source.name
        # Only the order of floating-point sums differs; a code on the edge may flip.
        assert torch.allclose(
            joint.packed.dequantise(), alone.packed.dequantise(), atol=0.02 * source.delta.std()
        )


@pytest.mark.parametrize("shape", [(128, 256), (256, 128), (64, 320)])
def test_bands_and_size_follow_the_plan(shape):
    source = NamedDelta(name="w", delta=long_tailed(*shape))
    (made,) = factorise_matrices([source], COME, hessian=None)
    assert made.packed.rank_bands == plan_bands(*shape, COME)
    assert made.packed.size_bytes * 8 <= 2.0 * shape[0] * shape[1]


@pytest.mark.parametrize("preset", ["come", "datafree"])
def test_the_reported_error_is_that_of_the_packed_bytes(preset):
    delta = long_tailed(96, 160)
    recipe = get_recipe(preset, matrix_bits=3.0)
    (made,) = factorise_matrices([NamedDelta(name="w", delta=delta)], recipe, hessian=None)
    error = torch.linalg.norm(made.packed.dequantise() - delta) / torch.linalg.norm(delta)
    assert made.relative_error == pytest.approx(error.item(), rel=1e-4)
    assert (made.packed.sigma >= 0).all()


def test_a_delta_of_rank_one_is_nearly_exact():
    delta = draw(96, 1) @ draw(1, 128)
    (made,) = factorise_matrices([NamedDelta(name="w", delta=delta)], COME, hessian=None)
    assert made.relative_error < 0.02


def test_a_matrix_without_a_band_is_no_business_of_the_factoriser():
    recipe = get_recipe("come", matrix_bits=0.05)
    with pytest.raises(InternalError, match=r"too small for 0\.05 bits"):
        factorise_matrices([NamedDelta(name="w", delta=draw(40, 40))], recipe, hessian=None)


@pytest.mark.parametrize("name", ["hub", "datafree", "come"])
def test_matrices_that_share_an_input_give_what_each_gives_alone(name):
    recipe = get_recipe(name, matrix_bits=2.0)
    x = torch.randn(900, 192, generator=torch.Generator().manual_seed(3))
    hessian = x.T @ x / len(x) if recipe.calibrated else None
    sources = [
        NamedDelta(
            name=f"w{rows}",
            delta=torch.randn(rows, 192, generator=torch.Generator().manual_seed(rows)),
        )
        for rows in (64, 128, 192)
    ]
    together = factorise_matrices(sources, recipe, hessian=hessian)
    for source, made in zip(sources, together, strict=True):
        (alone,) = factorise_matrices([source], recipe, hessian=hessian)
        assert torch.equal(alone.packed.sigma, made.packed.sigma)
        for one, other in zip(alone.packed.bands, made.packed.bands, strict=True):
            for a, b in ((one.u, other.u), (one.v, other.v)):
                assert torch.equal(a.codes, b.codes)
                assert torch.equal(a.scale, b.scale)
