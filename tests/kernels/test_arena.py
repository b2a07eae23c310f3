import inspect
from dataclasses import replace

import pytest
import torch
from arenas import BY_TILE, BY_VECTOR, DIRECT, SITE, build_arena, draw, expected_terms, relative
from safetensors.torch import load_file

from deltacome_core.errors import InternalError, UserError
from deltacome_core.layout import RankBand
from kernels import batch_reference, serving
from kernels.bench.correctness import ACTIVATIONS, BatchCase, exact_delta, run_case
from kernels.dense import Unfolder, merge_site, multiply_prompt
from kernels.fragments import FAST_PLANES
from kernels.image import Site
from kernels.plan import StepPlan
from kernels.triton_ops import launch_batch
from kernels.tuning import Shape


def test_a_batch_of_one_recipe_is_exact_repeatable_and_free_of_order():
    case = BatchCase(layouts=(BY_VECTOR,), slots=(0, -1), outs=(17, 16), width=70)
    row = run_case(case, "cpu")
    assert row["passed"], row


@pytest.mark.parametrize(
    ("planes", "limit", "numbers"),
    [(4, 2e-6, (1, 0, 2, -1, 0)), (3, 1e-4, (1, 0, 2, -1, 1))],
    ids=str,
)
def test_recipes_of_every_kind_share_a_batch(planes, limit, numbers):
    deltas = [draw(BY_VECTOR), draw(BY_TILE, seed=1), draw(DIRECT, seed=2, without=("q",))]
    arena, slots = build_arena(deltas)
    x = torch.randn(len(numbers), 70, generator=torch.Generator().manual_seed(3)).half()
    plan = StepPlan(arena, n_tokens=len(numbers), planes=planes)
    plan.x_planes.fill_(85)
    plan.h_planes.fill_(85)
    plan.assign([slots[number] if number >= 0 else -1 for number in numbers])
    y = serving.add_delta(torch.zeros(len(numbers), 33), x, plan, 0)
    wanted = expected_terms(deltas, numbers, x)
    assert relative(y, wanted) <= limit
    assert torch.equal(y[wanted == 0], torch.zeros(int((wanted == 0).sum())))


@pytest.mark.parametrize(
    ("before", "without", "shrinks"),
    [(0, (), False), (1, ("q",), True), (264, (), True)],
    ids=["delta-first", "one-part-between", "delta-last"],
)
def test_a_lone_token_has_its_whole_layer_in_one_launch(before, without, shrinks):
    site = replace(SITE, out_features=(64, 32))
    delta = draw(replace(BY_VECTOR, wide=(RankBand(2, 33),)), site=site, without=without)
    arena, (slot,) = build_arena([delta], site=site)
    generator = torch.Generator().manual_seed(11)
    x, weight = (torch.randn(n, 70, generator=generator) for n in (1, 96))
    bias = torch.randn(96, generator=generator)
    plan = StepPlan(arena, n_tokens=1)
    cut = Shape(blocks=2, along_steps=1, along_rows=1, ahead=2)
    shape = replace(cut, streams_first=before, shrinks=shrinks)
    base = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    found = {}
    # The last of three runs must not take the first one's arrivals for its own.
    for number in (0, -1, 0):
        plan.terms.fill_(torch.nan)
        plan.products.fill_(torch.nan)
        plan.assign([slot if number == 0 else -1])
        y = serving.multiply_layer(x, weight, bias, plan, 0, shape)
        assert torch.equal(y, found.setdefault(number, y))
        wanted = base + expected_terms([delta], [number], x, site)
        assert relative(y, wanted) <= 1e-6


def test_a_weak_band_keeps_its_bits_beside_a_strong_one_in_fast_mode():
    drawn = draw(BY_VECTOR, without=("k",))["q"]
    weak = sum(band.rank for band in drawn.bands[:-1])

    def build(strong, rest):
        share = torch.cat(
            [torch.full((weak,), strong), torch.full((len(drawn.sigma) - weak,), rest)]
        )
        return {"q": replace(drawn, sigma=drawn.sigma * share)}

    x = torch.randn(4, 70, generator=torch.Generator().manual_seed(5))
    found = []
    for delta in (build(1e3, 1.0), build(1e3, 0.0)):
        arena, slots = build_arena([delta])
        plan = StepPlan(arena, n_tokens=4, planes=FAST_PLANES)
        plan.assign(slots * 4)
        found.append(serving.add_delta(torch.zeros(4, 33), x, plan, 0))
    wanted = expected_terms([build(0.0, 1.0)], [0] * 4, x)
    # What is left beside it is the rounding of the fp32 sum, a thousand times as large.
    assert relative(found[0] - found[1], wanted) <= 1.5e-2


@pytest.mark.parametrize("key", ["28.qkv", "28.down"])
def test_inputs_of_a_real_model_cost_no_precision(key):
    recorded = load_file(ACTIVATIONS)[key][:1]
    assert float(recorded.abs().amax() / recorded.float().square().mean().sqrt()) > 10
    site = Site(name="s", parts=("a",), out_features=(16,), in_features=recorded.shape[1])
    delta = draw(replace(BY_VECTOR, wide=(RankBand(3, 9),)), site=site)
    arena, (slot,) = build_arena([delta], site=site)
    plan = StepPlan(arena, n_tokens=1)
    plan.assign([slot])
    y = serving.add_delta(torch.zeros(1, 16), recorded, plan, 0)
    assert relative(y, expected_terms([delta], [0], recorded, site)) <= 2e-6


def test_how_a_program_is_cut_changes_no_bit(monkeypatch):
    site = replace(SITE, parts=("q",), out_features=(65,))
    delta = draw(replace(BY_VECTOR, wide=(RankBand(2, 33),)), site=site)
    arena, (slot,) = build_arena([delta], site=site)
    x = torch.randn(7, 70, generator=torch.Generator().manual_seed(9))
    found = []
    ahead = Shape(blocks=2, along_steps=1, along_rows=1, ahead=2, inputs_ahead=True)
    for shape in (
        Shape(blocks=2, along_steps=2, along_rows=2, ahead=1),
        ahead,
        Shape(blocks=1, along_steps=2, along_rows=4, ahead=1),
        # The last program has one block of rows where the others have two.
        replace(ahead, turns=2),
        # Seven tokens are four, two and one.
        Shape(blocks=2, along_steps=2, along_rows=2, ahead=1, turns=8, tokens=2),
        Shape(blocks=2, along_steps=1, along_rows=4, ahead=1, tokens=4),
        replace(ahead, along_rows=4, turns=2, tokens=4, tokens_first=True),
    ):
        monkeypatch.setattr(serving, "shape_for", lambda *_, shape=shape: shape)
        plan = StepPlan(arena, n_tokens=7)
        plan.assign([slot] * 7)
        plan.h_planes.fill_(85)
        found.append(serving.add_delta(torch.zeros(7, 65), x, plan, 0))
    # As where so many codes are multiplied that a byte of their sums takes 32 bits.
    monkeypatch.setattr(launch_batch, "_NARROW_CODES", 0)
    found.append(serving.add_delta(torch.zeros(7, 65), x, plan, 0))
    assert relative(found[0], expected_terms([delta], [0] * 7, x, site)) <= 2e-6
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_outliers_cost_no_precision():
    delta = draw(replace(BY_VECTOR, wide=(RankBand(2, 9),)))
    arena, (slot,) = build_arena([delta])
    x = torch.randn(1, 70, generator=torch.Generator().manual_seed(0))
    x[:, [3, 41]] *= 1000
    plan = StepPlan(arena, n_tokens=1)
    plan.assign([slot])
    y = serving.add_delta(torch.zeros(1, 33), x.bfloat16(), plan, 0)
    assert relative(y, expected_terms([delta], [0], x.bfloat16())) <= 2e-6


def test_an_input_of_zeros_gives_zeros():
    arena, (slot,) = build_arena([draw(replace(BY_VECTOR, wide=(RankBand(2, 3),)))])
    plan = StepPlan(arena, n_tokens=1)
    plan.assign([slot])
    y = serving.add_delta(torch.ones(1, 33), torch.zeros(1, 70), plan, 0)
    assert torch.equal(y, torch.ones(1, 33))


def test_the_reference_has_the_signature_and_the_result_of_the_kernels():
    wanted = inspect.signature(serving.add_delta)
    assert inspect.signature(batch_reference.add_delta) == wanted
    deltas = [draw(BY_VECTOR), draw(BY_TILE, seed=1, without=("k",)), draw(DIRECT, seed=2)]
    arena, slots = build_arena(deltas, operand_order=False)
    plan = StepPlan(arena, n_tokens=4)
    plan.assign([slots[2], -1, slots[1], slots[0]])
    x = torch.randn(4, 70, generator=torch.Generator().manual_seed(5))
    y = serving.add_delta(torch.zeros(4, 33), x, plan, 0)
    assert relative(y, expected_terms(deltas, [2, -1, 1, 0], x)) <= 2e-6


# Of 72 columns a thread's eight values are one store.
@pytest.mark.parametrize("width", [70, 72])
@pytest.mark.parametrize("layout", [BY_VECTOR, BY_TILE, DIRECT], ids=str)
def test_resident_factors_unfold_for_prompts_and_merging(layout, width, monkeypatch):
    monkeypatch.setattr("kernels.triton_ops.unfold._PROGRAMS", 1)
    site = replace(SITE, in_features=width)
    delta = draw(layout, site=site, without=("k",))
    arena, (slot,) = build_arena([delta], site=site)
    unfolder = Unfolder(arena, dtype=torch.float16)
    generator = torch.Generator().manual_seed(6)
    weight, x = (torch.randn(n, width, generator=generator).half() for n in (33, 5))
    merged = merge_site(weight, unfolder, slot, 0, out=torch.full_like(weight, torch.nan))
    wanted = weight.double()
    wanted[:17] += exact_delta(delta["q"])
    assert relative(merged, wanted) <= 1e-3
    assert torch.equal(merged[17:], weight[17:])
    y = multiply_prompt(torch.zeros(5, 33).half(), x, unfolder, slot, 0)
    assert relative(y, expected_terms([delta], [0] * 5, x, site)) <= 2e-3
    with pytest.raises(UserError, match="no delta"):
        multiply_prompt(y, x, unfolder, -1, 0)


def test_delta_linear_is_one_operator_of_torch():
    deltas = [draw(BY_VECTOR), draw(BY_TILE, seed=1)]
    arena, slots = build_arena(deltas, operand_order=False)
    plan = StepPlan(arena, n_tokens=3)
    generator = torch.Generator().manual_seed(7)
    x, weight = (torch.randn(n, 70, generator=generator) for n in (3, 33))
    bias = torch.randn(33, generator=generator)

    def layer(rows):
        return serving.delta_linear(rows, weight, arena, 0, plan, bias)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for numbers in ([0, -1, 1], [1, 1, -1]):
        # The same compiled call serves other tenants.
        plan.assign([slots[number] if number >= 0 else -1 for number in numbers])
        base = torch.nn.functional.linear(x, weight, bias)
        wanted = base.double() + expected_terms(deltas, numbers, x)
        assert relative(compiled(x), wanted) <= 1e-6
        assert torch.equal(compiled(x)[numbers.index(-1)], base[numbers.index(-1)])


def test_a_plan_has_room_for_prompts_of_any_length():
    deltas = [draw(replace(BY_VECTOR, wide=(RankBand(2, 33),)), seed=seed) for seed in (0, 1)]
    arena, slots = build_arena(deltas)
    numbers = [0] * 3 + [-1] + [1] * 2
    x = torch.randn(len(numbers), 70, generator=torch.Generator().manual_seed(5)).half()
    plan = StepPlan(arena, n_places=8)
    plan.assign([slots[number] if number >= 0 else -1 for number in numbers])
    assert plan.place_tokens.tolist() == [0, 1, 2, 4, 5, -1, -1, -1]
    y = serving.add_delta(torch.zeros(len(numbers), 33), x, plan, 0)
    wanted = expected_terms(deltas, numbers, x)
    assert relative(y, wanted) <= 2e-6
    assert torch.equal(y[3], torch.zeros(33))
    with pytest.raises(InternalError, match="9 tokens where 8 have room"):
        plan.assign([slots[0]] * 9)
