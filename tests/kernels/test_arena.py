import inspect
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import kernels.arena
import kernels.image
from deltacome_core.errors import InternalError, UserError
from deltacome_core.layout import RankBand
from kernels import batch_reference, serving
from kernels.arena import ArenaSpec, DeltaArena
from kernels.bench.correctness import ACTIVATIONS, BatchCase, exact_delta, run_case
from kernels.bench.models import Layout, Pool
from kernels.dense import Unfolder, merge_site, multiply_prompt
from kernels.fragments import FragmentShape
from kernels.image import Site, build_image
from kernels.plan import StepPlan
from kernels.tuning import Shape

BY_VECTOR = Layout(
    name="vector",
    square=(),
    wide=(RankBand(8, 2), RankBand(4, 5), RankBand(3, 33)),
    group_v=(1, 0),
    group_u=(0, 1),
    symmetric=True,
)
BY_TILE = replace(
    BY_VECTOR,
    name="tile",
    wide=(RankBand(3, 2), RankBand(2, 7)),
    group_v=(1, 128),
    group_u=(1, 128),
    symmetric=False,
)
DIRECT = replace(BY_VECTOR, name="direct", group_v=(0, 0), direct_bits=1)
SITE = Site(name="qk", parts=("q", "k"), out_features=(17, 16), in_features=70)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Let one program do a repacking job: the interpreter runs programs one after the other."""
    monkeypatch.setattr(kernels.arena, "_REPACK_PROGRAMS", 1)


def draw(layout, *, seed=0, site=SITE, without=()):
    delta = Pool(seed).delta((site,), layout)
    return {name: matrix for name, matrix in delta.items() if name not in without}


def build_arena(deltas, *, n_slots=None, site=SITE, operand_order=True):
    images = [build_image((site,), delta) for delta in deltas]
    spec = ArenaSpec.covering((site,), images)
    n_slots = len(images) if n_slots is None else n_slots
    arena = DeltaArena(spec, n_slots=n_slots, device="cpu", operand_order=operand_order)
    return arena, [arena.load(image) for image in images]


def expected_terms(deltas, numbers, x, site=SITE):
    wanted = torch.zeros(len(x), site.total_out, dtype=torch.float64)
    for token, number in enumerate(numbers):
        first = 0
        for name, out in zip(site.parts, site.out_features, strict=True):
            if number >= 0 and name in deltas[number]:
                wanted[token, first : first + out] = (
                    exact_delta(deltas[number][name]) @ x[token].double()
                )
            first += out
    return wanted


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def test_a_batch_of_one_recipe_is_exact_repeatable_and_free_of_order():
    case = BatchCase(layouts=(BY_VECTOR,), slots=(0, -1), outs=(17, 16), width=70)
    row = run_case(case, "cpu")
    assert row["passed"], row


@pytest.mark.parametrize(
    ("planes", "units", "limit", "numbers"),
    [
        (4, 1, 2e-6, (1, 0, 2, -1)),
        (4, 2, 2e-6, (0, 0, 1, 0)),
        (2, 1, 5e-3, (1, 0, 2, -1, 1, 1, 0, 1, 1, 2)),
        (2, 2, 5e-3, (0, 1, 0, 0, 0, 2, 0, 0)),
    ],
    ids=str,
)
def test_recipes_of_every_kind_share_a_batch(planes, units, limit, numbers):
    deltas = [draw(BY_VECTOR), draw(BY_TILE, seed=1), draw(DIRECT, seed=2, without=("q",))]
    arena, slots = build_arena(deltas)
    x = torch.randn(len(numbers), 70, generator=torch.Generator().manual_seed(3)).half()
    plan = StepPlan(arena, n_tokens=len(numbers), units_per_group=units, planes=planes)
    plan.x_planes.fill_(85)
    plan.h_planes.fill_(85)
    plan.assign([slots[number] if number >= 0 else -1 for number in numbers])
    y = serving.add_delta(torch.zeros(len(numbers), 33), x, plan, 0)
    wanted = expected_terms(deltas, numbers, x)
    assert relative(y, wanted) <= limit
    assert torch.equal(y[wanted == 0], torch.zeros(int((wanted == 0).sum())))


@pytest.mark.parametrize(
    ("before", "without"),
    [(0, ()), (1, ("q",)), (264, ())],
    ids=["delta-first", "one-part-between", "delta-last"],
)
def test_a_lone_token_has_its_whole_layer_in_one_launch(before, without):
    site = replace(SITE, out_features=(64, 32))
    delta = draw(replace(BY_VECTOR, wide=(RankBand(2, 33),)), site=site, without=without)
    arena, (slot,) = build_arena([delta], site=site)
    generator = torch.Generator().manual_seed(11)
    x, weight = (torch.randn(n, 70, generator=generator) for n in (1, 96))
    bias = torch.randn(96, generator=generator)
    plan = StepPlan(arena, n_tokens=1)
    shape = Shape(blocks=2, along_steps=1, along_rows=1, ahead=2, streams_first=before)
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
    site = replace(SITE, parts=("q",), out_features=(17,))
    delta = draw(replace(BY_VECTOR, wide=(RankBand(2, 33),)), site=site)
    arena, (slot,) = build_arena([delta], site=site)
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(9))
    found = []
    for units, shape in (
        (1, Shape(blocks=1, along_steps=1, along_rows=1, ahead=1)),
        (2, Shape(blocks=2, along_steps=1, along_rows=1, ahead=2, inputs_ahead=True)),
    ):
        monkeypatch.setattr(serving, "shape_for", lambda *_, shape=shape: shape)
        plan = StepPlan(arena, n_tokens=3, units_per_group=units)
        plan.assign([slot] * 3)
        plan.h_planes.fill_(85)
        found.append(serving.add_delta(torch.zeros(3, 17), x, plan, 0))
    assert torch.equal(*found)


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


def take_apart(factor):
    arrays = {name: getattr(factor, name) for name in ("codes", "scale", "zero")}
    return {name: array for name, array in arrays.items() if array is not None}


def put_in_one_piece(delta, *, gap=0):
    """The same matrices as views of one memory, bytes between them or not."""
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    end = 0

    def move(array):
        nonlocal end
        first, end = end, -(-(end + array.nbytes) // 16) * 16 + gap
        raw = memory[first : first + array.nbytes]
        raw.copy_(array.contiguous().flatten().view(torch.uint8))
        return raw.view(array.dtype).view(array.shape)

    def move_factor(factor):
        return replace(factor, **{name: move(array) for name, array in take_apart(factor).items()})

    moved = {}
    for name, matrix in delta.items():
        if hasattr(matrix, "factor"):
            moved[name] = replace(matrix, factor=move_factor(matrix.factor))
            continue
        sigma = move(matrix.sigma)
        bands = tuple(
            replace(band, v=move_factor(band.v), u=move_factor(band.u)) for band in matrix.bands
        )
        moved[name] = replace(matrix, sigma=sigma, bands=bands)
    return memory, moved


def read_codes(image):
    """What each job that moves codes reads."""
    return [
        chunk.source[job[1] : job[1] + 4 * job[4] * job[6]].tolist()
        for chunk in image.chunks
        for job in image.jobs[chunk.first_job : chunk.first_job + chunk.n_jobs].tolist()
        if job[0] == kernels.image.CODES_JOB
    ]


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")], ids=["in order", "backwards"])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_a_delta_in_one_piece_of_memory_is_not_copied(monkeypatch, order, chunk_bytes):
    monkeypatch.setattr(kernels.image, "CHUNK_BYTES", chunk_bytes)
    sites = [replace(SITE, name=name, parts=(f"{name}.q", f"{name}.k")) for name in order]
    layouts = {"one": BY_VECTOR, "two": BY_TILE}
    delta = {
        name: matrix
        for site in sorted(sites, key=lambda site: site.name)
        for name, matrix in draw(layouts[site.name], site=site).items()
    }
    memory, moved = put_in_one_piece(delta)
    copied = build_image(sites, delta)
    found = build_image(sites, moved, memory=memory)
    inside = range(memory.data_ptr(), memory.data_ptr() + len(memory))
    assert all(chunk.source.data_ptr() in inside for chunk in found.chunks)
    assert found.source_bytes <= copied.source_bytes + 16 * len(found.chunks)
    assert read_codes(found) == read_codes(copied)
    assert torch.equal(found.directory, copied.directory)
    assert (found.slab_bytes, found.needs, found.cuts) == (
        copied.slab_bytes,
        copied.needs,
        copied.cuts,
    )


def test_pieces_far_apart_or_elsewhere_are_copied():
    delta = draw(BY_VECTOR)
    for gap, without in ((4096, ()), (0, ("k",))):
        memory, moved = put_in_one_piece(delta, gap=gap)
        mixed = moved | {name: delta[name] for name in without}
        image = build_image((SITE,), mixed, memory=memory)
        inside = range(memory.data_ptr(), memory.data_ptr() + len(memory))
        assert all(chunk.source.data_ptr() not in inside for chunk in image.chunks)
        assert read_codes(image) == read_codes(build_image((SITE,), delta))


def test_tokens_of_prompts_read_the_codes_together():
    deltas = [draw(replace(BY_VECTOR, wide=(RankBand(2, 33),)), seed=seed) for seed in (0, 1)]
    arena, slots = build_arena(deltas)
    numbers = [0] * 9 + [-1] + [1] * 3
    x = torch.randn(len(numbers), 70, generator=torch.Generator().manual_seed(5)).half()
    plan = StepPlan(arena, units_per_group=4, n_groups=4)
    plan.assign([slots[number] if number >= 0 else -1 for number in numbers])
    assert plan.group_counts.tolist() == [8, 1, 3, 0]
    y = serving.add_delta(torch.zeros(len(numbers), 33), x, plan, 0)
    wanted = expected_terms(deltas, numbers, x)
    assert relative(y, wanted) <= 2e-6
    assert torch.equal(y[9], torch.zeros(33))
    with pytest.raises(InternalError, match="5 groups of tokens where 4 have room"):
        plan.assign([slots[0]] * 33)


def test_slots_are_reused_and_run_out():
    image = build_image((SITE,), draw(BY_VECTOR))
    arena = DeltaArena(ArenaSpec.covering((SITE,), [image]), n_slots=2, device="cpu")
    assert [arena.load(image), arena.load(image)] == [0, 1]
    with pytest.raises(UserError, match="All 2 slots"):
        arena.load(image)
    arena.evict(0)
    assert arena.resident_slots == [1]
    arena.copy_slot(1, 0)
    assert arena.resident_slots == [0, 1]


@pytest.mark.parametrize("slot", [-2, 1, 5])
def test_a_wrong_slot_is_refused_before_a_launch(slot):
    arena, _ = build_arena([draw(BY_VECTOR)], n_slots=2, operand_order=False)
    plan = StepPlan(arena, n_tokens=1)
    with pytest.raises(UserError) as refused:
        plan.assign([slot])
    assert refused.value.code == "arena_slot_unknown"
    with pytest.raises(UserError):
        arena.evict(slot)


def test_an_evicted_slot_leaves_the_backbone_alone():
    arena, (slot,) = build_arena([draw(replace(BY_VECTOR, wide=(RankBand(2, 3),)))])
    plan = StepPlan(arena, n_tokens=1)
    plan.assign([slot])
    arena.evict(slot)
    y = serving.add_delta(torch.ones(1, 33), torch.ones(1, 70), plan, 0)
    assert torch.equal(y, torch.ones(1, 33))


def test_an_unaligned_slab_is_refused():
    image = build_image((SITE,), draw(BY_VECTOR))
    spec = ArenaSpec.covering((SITE,), [image])
    room = torch.empty(spec.slab_bytes + 256, dtype=torch.uint8)
    first = -room.data_ptr() % 128
    for slab in (room[first + 16 :], room[first : first + spec.slab_bytes - 1]):
        with pytest.raises(UserError) as refused:
            DeltaArena(spec, n_slots=1, device="cpu", slabs=[slab])
        assert refused.value.code == "arena_slab_unaligned"
    assert DeltaArena(spec, n_slots=1, device="cpu", slabs=[room[first:]]).n_slots == 1


@pytest.mark.parametrize(
    "other",
    [
        replace(BY_VECTOR, wide=(RankBand(1, 3),)),
        replace(BY_VECTOR, wide=(RankBand(3, 170),)),
        BY_TILE,
        DIRECT,
        replace(BY_VECTOR, wide=(RankBand(3, 8),), group_u=(1, 0)),
    ],
    ids=["width", "ranks", "tiles", "direct", "row-scales"],
)
def test_a_recipe_the_arena_was_not_built_for_is_refused(other):
    arena, _ = build_arena([draw(BY_VECTOR)], n_slots=2, operand_order=False)
    with pytest.raises(UserError) as refused:
        arena.load(build_image((SITE,), draw(other)))
    assert refused.value.code == "arena_recipe_unknown"


def test_an_arena_for_any_bands_takes_any_bands():
    spec = ArenaSpec.allowing(
        (SITE,), slab_bytes=1 << 16, max_rank=40, widths=frozenset({1, 2, 3, 4, 8})
    )
    arena = DeltaArena(spec, n_slots=6, device="cpu", operand_order=False)
    for bands in (
        (RankBand(8, 1), RankBand(4, 1), RankBand(3, 1), RankBand(2, 36), RankBand(1, 1)),
        (RankBand(1, 40),),
        (RankBand(8, 13), RankBand(1, 27)),
    ):
        arena.load(build_image((SITE,), draw(replace(BY_VECTOR, wide=bands))))
    with pytest.raises(UserError, match="more rank bands or ranks at qk"):
        arena.load(build_image((SITE,), draw(replace(BY_VECTOR, wide=(RankBand(1, 300),)))))
    with pytest.raises(UserError, match="scales for tiles at qk"):
        arena.load(build_image((SITE,), draw(BY_TILE)))


@pytest.mark.parametrize(
    "layout",
    [
        replace(BY_VECTOR, group_v=(0, 1)),
        replace(BY_TILE, group_u=(5, 3)),
        replace(BY_VECTOR, wide=(RankBand(2, 3), RankBand(2, 4))),
    ],
    ids=["column scales of V", "small groups of U", "a width twice"],
)
def test_groups_no_kernel_reads_are_refused(layout):
    with pytest.raises(UserError) as refused:
        build_image((SITE,), draw(layout))
    assert refused.value.code == "arena_recipe_unknown"


def test_a_matrix_of_another_shape_is_refused():
    narrow = replace(SITE, in_features=64)
    with pytest.raises(UserError, match="17 x 64"):
        build_image((SITE,), draw(BY_VECTOR, site=narrow))


def test_inputs_that_do_not_fit_are_refused():
    arena, _ = build_arena([draw(BY_VECTOR)], operand_order=False)
    plan, other = (StepPlan(arena, n_tokens=2) for _ in range(2))
    x, y, weight = torch.randn(2, 70), torch.randn(2, 33), torch.randn(33, 70)
    elsewhere = build_arena([draw(BY_VECTOR)], operand_order=False)[0]
    refused = [
        lambda: serving.add_delta(y, x[:, 1:], plan, 0),
        lambda: serving.add_delta(y[:, 1:], x, plan, 0),
        lambda: serving.add_delta(y, x[:1], plan, 0),
        lambda: serving.delta_linear(x, weight[1:], arena, 0, plan),
        lambda: serving.delta_linear(x, weight, elsewhere, 0, other),
        lambda: plan.assign([-1]),
        lambda: StepPlan(arena, n_tokens=1, planes=3),
    ]
    for call in refused:
        with pytest.raises(InternalError):
            call()
    assert serving.find_site(arena, "qk") == 0
    for call in (
        lambda: serving.add_delta(y, x, plan, 1),
        lambda: serving.find_site(arena, "o"),
    ):
        with pytest.raises(UserError) as unknown:
            call()
        assert unknown.value.code == "arena_site_unknown"


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_operand_order_wastes_only_the_padding(bits):
    whole = FragmentShape(rows=64, columns=4096, bits=bits)
    assert whole.size_bytes == 64 * 4096 * bits // 8
    odd = FragmentShape(rows=17, columns=65, bits=bits)
    assert (odd.row_blocks, odd.steps) == (2, 3)
    assert odd.size_bytes <= 32 * 128 * bits // 8
