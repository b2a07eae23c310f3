"""What an arena takes into its slots, and what it refuses by name."""

from dataclasses import replace

import pytest
import torch
from arenas import BY_TILE, BY_VECTOR, DIRECT, SITE, build_arena, draw

import kernels.arena
import kernels.image
from deltacome_core.errors import InternalError, UserError
from deltacome_core.layout import RankBand
from kernels import serving
from kernels.arena import ArenaSpec, DeltaArena
from kernels.fragments import FragmentShape, order_by_bit, order_by_tile
from kernels.image import build_image
from kernels.plan import StepPlan
from kernels.triton_ops.repack import repack_kernel


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


def check_repacked(wanted, image, *, bits, columns):
    found = torch.full_like(wanted, 85)
    for chunk in image.chunks:
        repack_kernel[(1, chunk.n_jobs)](
            image.jobs[chunk.first_job : chunk.first_job + chunk.n_jobs],
            chunk.source.data_ptr(),
            found.data_ptr(),
            WIDTHS=1 << bits,
            BLOCK=256,
            COLUMNS=columns,
        )
    written = found != 85
    assert written.any()
    assert torch.equal(found[written], wanted[written])


def test_codes_read_one_column_at_a_time_lie_where_32_at_once_put_them():
    """As a device reads them; the interpreter is given 32 columns, for its speed."""
    arena, (slot,) = build_arena([draw(replace(BY_TILE, wide=(RankBand(3, 2),)))])
    check_repacked(arena._slabs[slot], arena.images[slot], bits=3, columns=1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codes_of_whole_tiles_lie_where_one_code_after_the_other_puts_them(bits):
    site = replace(SITE, in_features=256)
    delta = draw(replace(BY_VECTOR, wide=(RankBand(bits, 128),)), site=site)
    arena, (slot,) = build_arena([delta], site=site)
    image = arena.images[slot]
    lie_in_tiles = (image.jobs[:, 0] == kernels.image.CODES_JOB) & (image.jobs[:, 10] != 0)
    assert lie_in_tiles.any()
    image.jobs[lie_in_tiles, 10] = 0
    check_repacked(arena._slabs[slot], image, bits=bits, columns=32)


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
        (SITE,), slab_bytes=1 << 16, max_rank=40, max_words=20, widths=frozenset({1, 2, 3, 4, 8})
    )
    arena = DeltaArena(spec, n_slots=6, device="cpu", operand_order=False)
    for bands in (
        (RankBand(8, 1), RankBand(4, 1), RankBand(3, 1), RankBand(2, 36), RankBand(1, 1)),
        (RankBand(1, 40),),
        (RankBand(8, 13), RankBand(1, 27)),
    ):
        arena.load(build_image((SITE,), draw(replace(BY_VECTOR, wide=bands))))
    with pytest.raises(UserError, match="more rank bands or ranks at qk"):
        arena.load(build_image((SITE,), draw(replace(BY_VECTOR, wide=(RankBand(1, 400),)))))
    with pytest.raises(UserError, match="scales for tiles at qk"):
        arena.load(build_image((SITE,), draw(BY_TILE)))


@pytest.mark.parametrize(
    "layout",
    [
        replace(BY_VECTOR, group_v=(0, 1)),
        replace(BY_TILE, group_u=(5, 3)),
    ],
    ids=["column scales of V", "small groups of U"],
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
        lambda: StepPlan(arena, n_tokens=1, planes=2),
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
    for order_by in (order_by_bit, order_by_tile):
        whole = FragmentShape(rows=64, steps=order_by(columns=4096, bits=bits).steps)
        assert whole.size_bytes == 64 * 4096 * bits // 8
        odd = FragmentShape(rows=17, steps=order_by(columns=129, bits=bits).steps)
        assert (odd.row_blocks, odd.steps) == (2, 2 * bits)
        assert odd.size_bytes == 32 * 256 * bits // 8
