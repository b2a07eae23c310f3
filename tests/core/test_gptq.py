import numpy as np
import pytest
import torch

from deltacome_core.errors import InternalError
from deltacome_core.gptq import prepare_feedback, quantise_with_feedback
from deltacome_core.quantize import largest_codes, round_to_nearest

CPU = torch.device("cpu")


def draw(rows: int, cols: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def correlated_hessian(cols: int, *, seed: int = 5) -> torch.Tensor:
    """Activations with a power-law spectrum, as inputs of linear layers have."""
    mixing = draw(cols, cols, seed=seed) * (torch.arange(1, cols + 1) ** -0.6)[:, None]
    tokens = draw(4 * cols, cols, seed=seed + 1) @ mixing
    return tokens.T @ tokens / tokens.shape[0]


def output_error(error: torch.Tensor, hessian: torch.Tensor) -> float:
    return torch.einsum("ri,ij,rj->", error.double(), hessian.double(), error.double()).item()


def test_identity_hessian_is_round_to_nearest():
    values, top = draw(9, 300), largest_codes(2, 9, CPU)
    feedback = prepare_feedback(torch.eye(300), group_size=128, damping=0.01)
    with_feedback = quantise_with_feedback(values, top, feedback)
    plain = round_to_nearest(values, top, group_size=128, clip_search=False)
    assert torch.equal(with_feedback.codes, plain.codes)
    assert torch.equal(with_feedback.scale, plain.scale)
    assert torch.equal(with_feedback.zero, plain.zero)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_lowers_the_output_error_on_correlated_activations(bits):
    hessian = correlated_hessian(320)
    values, top = draw(24, 320), largest_codes(bits, 24, CPU)
    feedback = prepare_feedback(hessian, group_size=128, damping=0.01)
    gptq = quantise_with_feedback(values, top, feedback).dequantise() - values
    plain = round_to_nearest(values, top, group_size=128, clip_search=False).dequantise() - values
    assert output_error(gptq, hessian) < 0.6 * output_error(plain, hessian)


def textbook_gptq(values, hessian, max_code, *, group_size, damping):
    """One column at a time with an explicit inverse, float64, group order as documented."""
    weights, hessian = values.astype(np.float64), hessian.astype(np.float64)
    cols = weights.shape[1]
    starts = list(range(0, cols, group_size))
    diagonal = np.diag(hessian)
    starts.sort(key=lambda s: -diagonal[s : s + group_size].mean())
    hessian = hessian + damping * diagonal.mean() * np.eye(cols)
    done = np.zeros(weights.shape)
    remaining = list(range(cols))
    for start in starts:
        group = list(range(start, min(start + group_size, cols)))
        low = np.minimum(weights[:, group].min(axis=1), 0)
        high = np.maximum(weights[:, group].max(axis=1), 0)
        scale = ((high - low) / max_code).astype(np.float16).astype(np.float64)
        zero = np.clip(np.round(-low / scale), 0, max_code)
        for column in sorted(group, key=lambda c: -diagonal[c]):
            inverse = np.linalg.inv(hessian[np.ix_(remaining, remaining)])
            at = remaining.index(column)
            code = np.clip(np.round(weights[:, column] / scale) + zero, 0, max_code)
            done[:, column] = (code - zero) * scale
            error = (weights[:, column] - done[:, column]) / inverse[at, at]
            weights[:, remaining] -= np.outer(error, inverse[at])
            remaining.remove(column)
    return done


def test_matches_the_textbook_in_double_precision():
    hessian, values = correlated_hessian(40), draw(6, 40)
    feedback = prepare_feedback(hessian, group_size=16, damping=0.01)
    ours = quantise_with_feedback(values, largest_codes(3, 6, CPU), feedback).dequantise()
    oracle = textbook_gptq(values.numpy(), hessian.numpy(), 7, group_size=16, damping=0.01)
    np.testing.assert_allclose(ours.numpy(), oracle, atol=1e-3)


def test_rows_do_not_influence_each_other():
    feedback = prepare_feedback(correlated_hessian(200), group_size=128, damping=0.01)
    values = draw(5, 200)
    top = torch.tensor([255.0, 7.0, 3.0, 3.0, 15.0])
    together = quantise_with_feedback(values, top, feedback).dequantise()
    alone = [
        quantise_with_feedback(values[i : i + 1], top[i : i + 1], feedback).dequantise()
        for i in range(5)
    ]
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)


def test_the_input_is_left_as_it_was():
    values = draw(4, 130)
    before = values.clone()
    feedback = prepare_feedback(correlated_hessian(130), group_size=128, damping=0.01)
    quantise_with_feedback(values, largest_codes(2, 4, CPU), feedback)
    assert torch.equal(values, before)


def test_columns_that_were_never_active_are_rounded_alone():
    hessian = correlated_hessian(128)
    hessian[10], hessian[:, 10] = 0.0, 0.0
    values, top = draw(3, 128), largest_codes(8, 3, CPU)
    feedback = prepare_feedback(hessian, group_size=128, damping=0.01)
    error = quantise_with_feedback(values, top, feedback).dequantise()[:, 10] - values[:, 10]
    assert error.abs().max() < 0.05


def test_a_singular_hessian_is_damped_until_it_factors():
    direction = draw(1, 96)
    hessian = direction.T @ direction - 0.5 * torch.eye(96)
    feedback = prepare_feedback(hessian, group_size=32, damping=0.01)
    assert torch.isfinite(feedback.inverse).all()
    again = prepare_feedback(hessian, group_size=32, damping=0.01)
    assert torch.equal(feedback.inverse, again.inverse)


def test_a_hessian_with_nan_is_refused():
    hessian = torch.eye(8)
    hessian[2, 2] = torch.nan
    with pytest.raises(InternalError, match="NaN"):
        prepare_feedback(hessian, group_size=8, damping=0.01)
