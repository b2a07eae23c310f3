import ctypes
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernels.arena
from deltacome_core.errors import InternalError
from deltacome_core.layout import RankBand
from kernels.arena import ArenaSpec, DeltaArena
from kernels.bench.correctness import exact_delta
from kernels.bench.models import Layout, Pool
from kernels.cuda_ops import launch, nvrtc
from kernels.image import Site, build_image
from kernels.plan import StepPlan
from kernels.triton_ops.launch_batch import launch_prepare

FOLDER = Path(__file__).parent / "emulation"
ALL_WIDTHS = Layout(
    name="all",
    square=(),
    wide=(RankBand(8, 2), RankBand(4, 5), RankBand(3, 33), RankBand(2, 50), RankBand(1, 19)),
    group_v=(1, 0),
    group_u=(0, 1),
    symmetric=True,
)
# Rows of more steps than a ring has room for.
LONG = replace(ALL_WIDTHS, wide=(RankBand(3, 300), RankBand(1, 20)))


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    monkeypatch.setattr(kernels.arena, "_REPACK_PROGRAMS", 1)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """stream.cu for a CPU, a thread for each of its threads."""
    library = tmp_path_factory.mktemp("emulation") / "stream.so"
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-Wno-attributes"]
    subprocess.run([*command, "-o", library, FOLDER / "stream.cpp"], check=True)
    return ctypes.CDLL(str(library))


def run(emulated, layout, site, slots, *, planes=4, blocks=3, without=(), dtype=torch.float32):
    """Outputs of both kernels from 0, and what they should be in float64."""
    deltas = [Pool(seed).delta((site,), layout) for seed in range(max(slots) + 1)]
    for name in without:
        del deltas[0][name]
    images = [build_image((site,), delta) for delta in deltas]
    spec = ArenaSpec.covering((site,), images)
    arena = DeltaArena(spec, n_slots=len(images), device="cpu", operand_order=True)
    for image in images:
        arena.load(image)
    plan = StepPlan(arena, n_tokens=len(slots), planes=planes)
    for poisoned in (plan.x_planes, plan.h_planes):
        poisoned.fill_(85)
    plan.assign(slots)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(len(slots), site.in_features, generator=generator)
    launch_prepare(x, plan, 0)
    y = torch.zeros(len(slots), site.total_out, dtype=dtype)
    arguments = ctypes.byref(launch.make_arguments(plan, 0, y))
    emulated.run_shrink(arguments, blocks)
    emulated.run_expand(arguments, blocks)
    wanted = torch.zeros(y.shape, dtype=torch.float64)
    for token, slot in enumerate(slots):
        first = 0
        for name, out in zip(site.parts, site.out_features, strict=True):
            if slot >= 0 and name in deltas[slot]:
                wanted[token, first : first + out] = (
                    exact_delta(deltas[slot][name]) @ x[token].double()
                )
            first += out
    return y, wanted


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def test_groups_of_every_size_and_width_are_exact(emulated):
    site = Site(name="s", parts=("a", "b"), out_features=(17, 48), in_features=330)
    slots = [0, 1, -1, 2, 2, 2, *[0] * 9, 1, 1, 1, 1, 1]
    y, wanted = run(emulated, ALL_WIDTHS, site, slots, without=("b",))
    assert relative(y, wanted) <= 2e-6
    assert torch.equal(y[wanted == 0], torch.zeros(int((wanted == 0).sum())))


def test_shares_of_the_work_do_not_change_a_bit(emulated):
    site = Site(name="s", parts=("a",), out_features=(70,), in_features=96)
    one, _ = run(emulated, ALL_WIDTHS, site, [0, 1, 1], blocks=1)
    many, _ = run(emulated, ALL_WIDTHS, site, [0, 1, 1], blocks=7)
    assert torch.equal(one, many)


def test_rows_longer_than_a_ring_in_two_planes_and_sixteen_bits(emulated):
    site = Site(name="s", parts=("a",), out_features=(40,), in_features=1500)
    y, wanted = run(emulated, LONG, site, [0, 0, 1], planes=2, dtype=torch.bfloat16)
    assert relative(y, wanted) <= 4e-3


def test_only_what_the_kernels_know_is_streamed():
    site = Site(name="s", parts=("a",), out_features=(40,), in_features=96)
    image = build_image((site,), Pool(0).delta((site,), ALL_WIDTHS))
    arena = DeltaArena(ArenaSpec.covering((site,), [image]), n_slots=1, device="cpu")
    assert not launch.can_stream(StepPlan(arena, n_tokens=4), 0)


def test_a_compiler_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "0.0")
    with pytest.raises(InternalError, match=r"libnvrtc\.so\.0"):
        nvrtc.compile_cubin("", arch=90, defines={})
