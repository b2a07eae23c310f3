import pytest
import torch

from deltacome_core.quantize import (
    encode,
    fit_grid,
    invert_scale,
    largest_codes,
    refit_sigma,
    round_to_nearest,
    search_grid,
)
from deltacome_core.svd import truncated_svd

CPU = torch.device("cpu")


def draw(rows: int, cols: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_stays_within_half_a_step_of_the_full_range(bits):
    values = draw(7, 300)
    factor = round_to_nearest(
        values, largest_codes(bits, 7, CPU), group_size=128, clip_search=False
    )
    step = factor.scale.float().repeat_interleave(128, dim=1)[:, :300]
    # Half a step for rounding, half for the zero point, and float16 rounding of the scale.
    assert ((factor.dequantise() - values).abs() <= step * (1 + 2**-10 * 2**bits)).all()
    assert factor.codes.max() <= 2**bits - 1
    assert factor.scale.shape == (7, 3)


def test_matches_a_scalar_oracle_in_double_precision():
    values = draw(3, 130)
    factor = round_to_nearest(values, largest_codes(3, 3, CPU), group_size=128, clip_search=False)
    for row in range(3):
        for group, columns in enumerate((range(128), range(128, 130))):
            part = [values[row, c].item() for c in columns]
            low, high = min(0.0, *part), max(0.0, *part)
            scale = torch.tensor((high - low) / 7).half().double().item()
            zero = min(7, max(0, round(-low / scale)))
            assert factor.scale[row, group].double().item() == scale
            assert factor.zero[row, group].item() == zero
            for c in columns:
                code = min(7, max(0, round(values[row, c].item() / scale) + zero))
                assert factor.codes[row, c].item() == code


def test_zero_is_exact_on_every_grid():
    values = draw(5, 64).abs() + 1.0
    values[:, 0] = 0.0
    factor = round_to_nearest(values, largest_codes(2, 5, CPU), group_size=64, clip_search=False)
    assert not factor.dequantise()[:, 0].any()


def test_an_all_zero_group_stays_zero():
    factor = round_to_nearest(
        torch.zeros(4, 128), largest_codes(2, 4, CPU), group_size=128, clip_search=True
    )
    assert not factor.dequantise().any()
    assert not factor.codes.any()


def test_rows_may_have_different_bit_widths():
    values = draw(2, 128)
    mixed = round_to_nearest(values, torch.tensor([255.0, 3.0]), group_size=128, clip_search=False)
    alone = [
        round_to_nearest(
            values[i : i + 1], largest_codes(bits, 1, CPU), group_size=128, clip_search=False
        )
        for i, bits in enumerate((8, 2))
    ]
    assert torch.equal(mixed.codes, torch.cat([factor.codes for factor in alone]))


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.75), (3, 0.95)])
def test_clip_search_lowers_the_error_of_gaussian_rows(bits, gain):
    values, top = draw(64, 512), largest_codes(bits, 64, CPU)
    plain = round_to_nearest(values, top, group_size=128, clip_search=False).dequantise() - values
    clipped = round_to_nearest(values, top, group_size=128, clip_search=True).dequantise() - values
    assert clipped.square().sum() < gain * plain.square().sum()


def test_clip_search_never_does_worse_than_the_full_range():
    values, top = draw(200, 128) ** 3, largest_codes(4, 200, CPU)

    def errors(fit):
        scale, zero = fit(values, top)
        codes = encode(values, invert_scale(scale)[:, None], zero[:, None], max_code=top[:, None])
        return ((codes - zero[:, None]) * scale[:, None] - values).square().sum(dim=1)

    assert (errors(search_grid) <= errors(fit_grid)).all()


def test_refitted_sigma_is_the_least_squares_optimum():
    delta = draw(60, 50)
    left, sigma, right = truncated_svd(delta, 12)
    rough_left = left + 0.05 * draw(60, 12, seed=2)
    rough_right = right + 0.05 * draw(12, 50, seed=3)
    refitted = refit_sigma(delta, rough_left, rough_right)

    def error(values):
        return torch.linalg.norm(delta - (rough_left * values) @ rough_right).item()

    design = torch.einsum("or,ri->oir", rough_left.double(), rough_right.double()).flatten(0, 1)
    optimum = torch.linalg.lstsq(design, delta.double().flatten()).solution
    assert torch.allclose(refitted.double(), optimum, rtol=1e-3, atol=1e-3)
    assert error(refitted) < error(sigma)


def test_refitted_sigma_is_never_negative():
    delta = draw(30, 40)
    left, right = draw(30, 25, seed=7), draw(25, 40, seed=8)
    refitted = refit_sigma(delta, left, right)
    assert (refitted >= 0).all()
    assert (refitted == 0).any()
    gradient = ((left.T @ ((left * refitted) @ right - delta)) * right).sum(dim=1)
    assert gradient[refitted > 0].abs().max() < 1e-2


def test_refit_survives_directions_that_quantised_to_zero():
    delta = draw(40, 40)
    left, sigma, right = truncated_svd(delta, 4)
    right[2] = 0.0
    assert torch.isfinite(refit_sigma(delta, left, right)).all()
    assert sigma[2] > 0
