import pytest
import torch

from deltacome_core.factorise import NamedDelta, factorise_matrices
from deltacome_core.quantize import unbias_sigma
from deltacome_core.recipe import get_recipe
from deltacome_core.vectors import (
    prepare_columns,
    quantise_columns,
    quantise_rows,
    quantise_side_by_side,
)
from deltacome_core.walk import Walks


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(cols, seed=5):
    x = draw(4 * cols, cols, seed=seed) * torch.arange(1, cols + 1) ** -0.5
    x = x + 0.5 * x[:, :1]
    return x.T @ x / len(x)


def widths(*counts):
    return torch.tensor([bits for bits, count in counts for _ in range(count)])


def test_rows_without_feedback_have_the_error_of_the_best_uniform_grid():
    """Max 1960, table II: .3634, .1188, .03744 and .01154 for a unit Gaussian."""
    bits = widths((1, 50), (2, 50), (3, 50))
    made = quantise_rows(draw(1, 150, 4096), bits[None], None)
    error = (made.values - draw(1, 150, 4096)).square().mean(dim=(0, 2)).view(3, 50).mean(dim=1)
    assert torch.allclose(error, torch.tensor([0.3634, 0.1188, 0.03744]), rtol=0.02)


def test_wide_codes_cover_their_largest_value():
    values = draw(1, 4, 512)
    values[0, :, 3] = 40.0
    made = quantise_rows(values, widths((8, 2), (4, 2))[None], None)
    assert torch.allclose(made.values[0, :, 3], torch.tensor(40.0), rtol=0.08)


@pytest.mark.parametrize("quantise", ["rows", "columns"])
def test_feedback_lowers_the_error_that_the_hessian_measures(quantise):
    values, hessian = draw(1, 96, 160), hessian_of(160)[None]
    feedback = prepare_columns(hessian, damping=0.01)
    if quantise == "rows":
        bits = torch.full((1, 96), 2)
        pair = [quantise_rows(values, bits, each, headroom=1.2) for each in (feedback, None)]
    else:
        bits = torch.full((1, 160), 2)
        pair = [quantise_columns(values, bits, each) for each in (feedback, None)]
    errors = [
        torch.einsum("bri,bij,brj->", made.values - values, hessian, made.values - values)
        for made in pair
    ]
    assert errors[0] < 0.7 * errors[1]


def test_a_batch_gives_what_its_elements_give_alone():
    values, hessian = draw(3, 20, 150), torch.stack([hessian_of(150, seed) for seed in range(3)])
    bits = widths((4, 4), (2, 10), (1, 6)).expand(3, -1)
    whole = quantise_rows(values, bits, prepare_columns(hessian, damping=0.01))
    for at in range(3):
        one = slice(at, at + 1)
        alone = quantise_rows(values[one], bits[one], prepare_columns(hessian[one], damping=0.01))
        assert torch.equal(whole.codes[one], alone.codes)


@pytest.mark.parametrize("with_feedback", [True, False])
def test_matrices_side_by_side_give_what_each_gives_alone(with_feedback):
    shapes = [(40, 200), (24, 64), (40, 150)]
    lefts = [draw(*shape, seed=at) for at, shape in enumerate(shapes)]
    bits = [widths((4, 10), (2, 20), (1, cols - 30)) for _, cols in shapes]
    feedback = [
        prepare_columns(hessian_of(cols, seed)[None], damping=0.01)
        for seed, (_, cols) in enumerate(shapes)
    ]
    together = quantise_side_by_side(lefts, bits, feedback if with_feedback else None)
    for at, made in enumerate(together):
        alone = quantise_columns(
            lefts[at][None], bits[at][None], feedback[at] if with_feedback else None
        )
        assert torch.equal(made.codes, alone.codes[0])
        assert torch.equal(made.scale, alone.scale[0])


def test_a_walk_that_is_used_again_keeps_nothing_of_the_matrix_before():
    walks, bits = Walks(), widths((4, 6), (2, 30), (1, 20))
    wide, narrow = (prepare_columns(hessian_of(n)[None], damping=0.01) for n in (200, 56))
    for values, feedback in ((draw(1, 56, 200), wide), (draw(1, 40, 200, seed=1), wide)):
        rows = bits[None, : values.shape[1]]
        again = quantise_rows(values, rows, feedback, walks=walks)
        assert torch.equal(again.codes, quantise_rows(values, rows, feedback).codes)
    for seed in (2, 3):
        values = draw(1, 64, 56, seed=seed) * 10.0**seed
        again = quantise_columns(values, bits[None], narrow, walks=walks)
        alone = quantise_columns(values, bits[None], narrow)
        assert torch.equal(again.codes, alone.codes)
        assert torch.equal(again.scale, alone.scale)


def test_codes_stay_on_their_grids():
    bits = widths((8, 2), (4, 3), (3, 5), (2, 9), (1, 11))
    feedback = prepare_columns(hessian_of(30)[None], damping=0.01)
    made = quantise_columns(draw(1, 64, 30), bits[None], feedback)
    assert torch.all(made.codes[0].amax(dim=0) < 2**bits)


def test_a_zero_vector_stays_zero():
    values = draw(1, 4, 64)
    values[0, 2] = 0
    made = quantise_rows(values, torch.full((1, 4), 2), None)
    assert torch.equal(made.values[0, 2], torch.zeros(64))


def test_datafree_keeps_the_strength_that_plain_least_squares_loses():
    rank = 192
    left = torch.linalg.qr(draw(256, rank, seed=1)).Q
    right = torch.linalg.qr(draw(rank, rank, seed=2)).Q
    delta = (left * torch.arange(1, rank + 1) ** -0.8) @ right.T
    source = [NamedDelta(name="w", delta=delta)]
    (made,) = factorise_matrices(source, get_recipe("datafree"), hessian=None)
    top = left[:, :16].T
    strength = (top @ made.packed.dequantise() * (top @ delta)).sum() / (top @ delta).square().sum()
    assert torch.allclose(strength, torch.tensor(1.0), atol=0.02)


def test_strength_is_kept_on_the_inputs_that_the_hessian_describes():
    left, right = torch.linalg.qr(draw(40, 6)).Q, torch.linalg.qr(draw(30, 6, seed=3)).Q.T
    rounded_left, rounded_right = (
        left + 0.1 * draw(40, 6, seed=4),
        right + 0.1 * draw(6, 30, seed=6),
    )
    hessian, sigma = hessian_of(30), torch.arange(6, 0, -1).float()
    made = unbias_sigma(
        sigma,
        left=left,
        right=right,
        rounded_left=rounded_left,
        rounded_right=rounded_right,
        hessian=hessian,
    )
    for i in range(6):
        direction = rounded_left[:, i : i + 1] * made[i] * rounded_right[i]
        kept = left[:, i] @ direction @ hessian @ right[i]
        assert torch.allclose(kept, sigma[i] * right[i] @ hessian @ right[i], rtol=1e-4)


def test_a_direction_that_no_input_excites_keeps_its_sigma():
    left, right = torch.eye(4)[:, :2], torch.eye(6)[:2]
    hessian = torch.diag(torch.tensor([1.0, 0, 1, 1, 1, 1]))
    sigma = unbias_sigma(
        torch.tensor([3.0, 2.0]),
        left=left,
        right=right,
        rounded_left=left,
        rounded_right=right * 0.5,
        hessian=hessian,
    )
    assert sigma.tolist() == [6.0, 2.0]
