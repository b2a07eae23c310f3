import pytest
import torch

from deltacome_core.quantize import (
    encode,
    fit_grid,
    invert_scale,
    largest_codes,
    round_to_nearest,
    search_grid,
    unbias_sigma,
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


def test_unbiased_sigma_restores_the_strength_of_each_direction():
    delta = draw(200, 300)
    left, sigma, right = truncated_svd(delta, 12)
    rounded = []
    for factor in (left.T.contiguous(), right):
        top = largest_codes(2, 12, CPU)
        rounded.append(round_to_nearest(factor, top, group_size=128, clip_search=True).dequantise())
    rounded_left, rounded_right = rounded[0].T, rounded[1]

    def strength(values):
        return (left * rounded_left).sum(0) * values * (right * rounded_right).sum(1)

    unbiased = unbias_sigma(
        sigma,
        left=left,
        right=right,
        rounded_left=rounded_left,
        rounded_right=rounded_right,
    )
    assert torch.allclose(strength(unbiased), sigma, rtol=1e-5)
    # Two bits with the best clip lose about 12 % of the energy on each side.
    assert (strength(sigma) < 0.85 * sigma).all()


def test_a_direction_that_was_lost_is_not_blown_up():
    left, sigma, right = truncated_svd(draw(40, 40), 4)
    gone = torch.zeros_like(right)
    options = {"left": left, "right": right, "rounded_left": left, "rounded_right": gone}
    assert (unbias_sigma(sigma, **options) <= 4 * sigma).all()
