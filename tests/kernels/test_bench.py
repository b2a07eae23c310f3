import json
import signal
import subprocess
import sys

import pytest
import torch
from interpreters import run_here
from source_tree import ROOT

import kernels.arena
import kernels.triton_ops.unfold
from deltacome_core.bands import plan_bands
from deltacome_core.layout import RankBand
from deltacome_core.packed import PackedMatrix
from deltacome_core.recipe import get_recipe
from kernels import reference, tune
from kernels.bench import __main__ as bench
from kernels.bench import baselines, chart, checks, compiling, models, sections
from kernels.bench.bars import TARGETS, judge, prefill_floor
from kernels.bench.correctness import cover_case, list_cases
from kernels.fragments import PRECISIONS
from kernels.image import build_image

REPORTS = [ROOT / f"docs/benchmarks/{name}.json" for name in ("kernels", "kernels_h100")]


def decode_row(n_tenants, planes, **changes):
    return {
        "n_tenants": n_tenants,
        "planes": planes,
        "base_us": 100.0,
        "term_us": 10.0 * n_tenants,
        "step_us": 100.0 + 10 * n_tenants,
        "factor": 1 + n_tenants / 10,
        "gbps": 3000.0,
        **changes,
    }


def test_bars_are_computed_from_the_sections():
    rows = {
        "ceilings": {"read_gbps": 4000.0},
        "decode": [decode_row(n, planes) for n in (1, 8, 32) for planes in (2, 4)],
        "zipf": [decode_row(20, planes, step_us=297 + 4.5 * planes / 4) for planes in (2, 4)],
        "baselines": {"eager_us": 900.0, "bmm_us": 1600.0},
        "loading": {"load_us": 19000.0},
    }
    bars = {bar["name"]: bar for bar in judge(rows)}
    assert bars["delta term, 1 tenant, over PyTorch eager"]["measured"] == 90
    assert bars["delta term, 1 tenant, over PyTorch eager"]["met"]
    assert bars["delta term, 32 tenants, over bf16 low-rank bmm"]["measured"] == 5
    assert bars["decode over base-only, 1 tenant, fast"]["measured"] == pytest.approx(1.1)
    assert bars["share of measured bandwidth, 32 tenants"]["measured"] == 0.75
    zipf = "Zipf mix over (base + distinct x per-tenant time)"
    assert bars[f"{zipf}, exact"]["measured"] == pytest.approx(1.005)
    assert bars[f"{zipf}, fast"]["measured"] == pytest.approx(0.9975)
    assert bars["host to GPU of one 7B delta, ms"]["met"]
    missing = bars["merge of a whole 7B, ms"]
    assert (missing["measured"], missing["met"]) == (None, False)


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_the_committed_report_has_every_bar_and_its_chart(path):
    report = json.loads(path.read_text())
    assert [bar["name"] for bar in report["bars"]] == list(TARGETS)
    assert report["bars"] == judge(report["rows"])
    assert {"device", "versions", "commit", "ceilings", "rows"} <= set(report)
    assert path.with_suffix(".svg").read_text() == chart.draw(report)


def test_without_a_device_nothing_is_measured():
    for module in ("kernels.bench", "kernels.tune"):
        command = [sys.executable, "-m", module]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 1
        assert "nothing was measured" in run.stderr


def test_the_eager_baseline_is_the_delta_term():
    layout = models.Layout(
        name="small",
        square=(),
        wide=(RankBand(8, 16), RankBand(3, 40), RankBand(2, 130), RankBand(1, 9)),
        group_v=(1, 0),
        group_u=(0, 1),
        symmetric=True,
    )
    matrix = models.Pool(1).matrix("m", 256, 512, layout)
    assert isinstance(matrix, PackedMatrix)
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = reference.expand(reference.shrink(x, matrix), matrix)
    found = baselines.eager_delta(x, matrix).float()
    # Both products and the sum of bands are rounded to bf16.
    assert float((found - wanted).norm() / wanted.norm()) < 2e-2


def test_a_zipf_batch_repeats_the_popular():
    slots = sections.draw_zipf(64, 64, seed=0)
    assert len(slots) == 64
    assert 15 < len(set(slots)) < 45
    assert slots == sections.draw_zipf(64, 64, seed=0)


def test_bands_of_the_benchmark_fill_one_bit_a_parameter():
    for layout in (models.HUB, models.COME):
        for out, width, budget in ((4096, 4096, 2048), (11008, 4096, 2985)):
            spent = sum(band.bits * band.rank for band in layout.bands(out, width))
            assert 0.97 * budget <= spent <= budget


@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (4096, 11008)], ids=str)
def test_the_benchmark_has_the_bands_of_the_default_recipe(shape):
    energies = models.measured_energies()
    assert energies == sorted(energies, reverse=True)
    recipe = get_recipe("hub", matrix_bits=1.0)
    assert plan_bands(*shape, recipe, energies=energies) == models.HUB.bands(*shape)


def test_the_table_takes_the_fastest_shape():
    shape = {"blocks": 1, "along_steps": 4, "along_rows": 1, "ahead": 2}
    sizes = {"stage": "expand", "tokens": 8, "steps": 27, "rows": 64}
    slow = sizes | {"shape": shape | {"ahead": 4}, "us": 3.0}
    fast = slow | {"shape": shape, "us": 2.0}
    (chosen,) = tune.choose([slow, fast, fast])
    # The same shape at two sites counts twice: 4 against 3.
    assert (chosen["shape"], chosen["us"]) == (slow["shape"], 3.0)
    assert tune.choose([slow, fast])[0]["shape"] == shape


def test_cases_of_a_device_mix_recipes_and_precisions():
    cases = list(list_cases())
    assert len(set(map(str, cases))) == len(cases)
    assert {case.planes for case in cases} == set(PRECISIONS.values())
    assert any(len({layout.name for layout in case.layouts}) == 3 for case in cases)
    assert any(case.outliers for case in cases)
    for case in cases:
        for layout in case.layouts:
            bands = [layout.bands(out, case.width) for out in case.outs]
            assert all(bands) != bool(layout.direct_bits), (str(case), layout.name)


def test_the_arena_of_a_case_takes_all_of_its_deltas():
    case = next(case for case in list_cases() if len(set(case.layouts)) == 3)
    spec = cover_case(case)
    for seed, layout in enumerate(case.layouts, start=1):
        spec.check(build_image(spec.sites, models.Pool(seed).delta(spec.sites, layout)))


# Launches are noted on a CPU, by a driver that replaces the process's own.
LAUNCHES = """
import torch
from dataclasses import replace
from deltacome_core.layout import RankBand
from kernels import serving
from kernels.arena import ArenaSpec, DeltaArena
from kernels.bench.compiling import want_case, want_steps
from kernels.bench.correctness import cover_case, list_cases
from kernels.bench.models import HUB, ModelShape, Pool
from kernels.fragments import PRECISIONS
from kernels.image import build_image
from kernels.plan import StepPlan
from kernels.precompile import list_kernels, noting_launches

serving.functional.linear = lambda x, weight, _: x.new_empty(len(x), len(weight))
bands = tuple(RankBand(bits, 16) for bits in (4, 3, 2, 1))
layout = replace(HUB, square=bands, wide=bands, deep=bands)
model = ModelShape(name="small", n_layers=2, hidden=256, intermediate=384, key_value=128)
sites, sizes = model.sites(), (1, 3, 17)

def launch(spec, n_tokens, planes=4):
    arena = DeltaArena(spec, n_slots=1, device="cpu", operand_order=True)
    plan = StepPlan(arena, n_tokens=n_tokens, planes=planes)
    plan.assign([-1] * n_tokens)
    for number, site in enumerate(spec.sites):
        x = torch.zeros(n_tokens, site.in_features).bfloat16()
        y = torch.zeros(n_tokens, site.total_out)
        serving.add_delta(y, x, plan, number)
        serving.add_delta(y.bfloat16(), x, plan, number)
        weight = torch.zeros(site.total_out, site.in_features).bfloat16()
        serving.delta_linear(x, weight, arena, number, plan)

def compare(used, wanted):
    listed = {job.specialization: job.name for one in wanted for job in list_kernels(one, arch=90)}
    idle = {listed[key] for key in listed.keys() - used.keys()}
    print(len(used.keys() - listed.keys()), sorted(idle), end=" ")

with noting_launches(90) as used:
    for case in list_cases():
        launch(cover_case(case), len(case.slots), case.planes)
compare(used, map(want_case, list_cases()))
spec = ArenaSpec.covering(sites, [build_image(sites, Pool(1).delta(sites, layout))])
with noting_launches(90) as used:
    for n_tokens in sizes:
        for planes in PRECISIONS.values():
            launch(spec, n_tokens, planes=planes)
compare(used, [want_steps(model, layout, sizes, all_planes=(4, 3))])
"""


def test_what_cases_and_steps_launch_is_compiled_before_and_little_else():
    idle = "['repack_kernel', 'unfold_kernel']"
    assert run_here(LAUNCHES) == f"0 {idle} 0 {idle} "


def test_a_compiler_that_is_late_is_ended(monkeypatch):
    monkeypatch.setattr(compiling, "current_arch", lambda: 90)
    started = []

    def start(wanted):
        started.append(start_compiler(wanted))
        return started[-1]

    start_compiler = compiling.start_compiler
    monkeypatch.setattr(compiling, "start_compiler", start)
    case = next(list_cases())
    compiling.compile_within([compiling.want_case(case)], 0.1)
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_a_case_that_is_late_costs_no_other_its_result(monkeypatch):
    compiled = []

    def ask(arguments, limit_s):
        if arguments == ["--case", "7"]:
            raise subprocess.TimeoutExpired("case", limit_s)
        return "" if arguments == ["--case", "8"] else json.dumps({"passed": True})

    monkeypatch.setattr(compiling, "compile_within", lambda wanted, _: compiled.extend(wanted))
    monkeypatch.setattr(bench, "_ask_process", ask)
    rows = bench.check_correctness(60.0)
    assert len(rows) == len(compiled) == len(list(list_cases()))
    missed = {row["exception"] for row in rows if not row["passed"]}
    assert missed == {"not compiled in time", "ended without a result"}
    assert [number for number, row in enumerate(rows) if not row["passed"]] == [7, 8]


def test_rows_prompts_and_merging_are_checked(monkeypatch):
    monkeypatch.setattr(kernels.triton_ops.unfold, "_PROGRAMS", 1)
    few = models.Layout(
        name="few",
        square=(RankBand(2, 5),),
        wide=(RankBand(2, 5),),
        group_v=(1, 0),
        group_u=(0, 1),
        symmetric=True,
    )
    sizes = {"HUB": few, "_WIDTH": 32, "_ROWS": 9, "_TOKENS": 3, "_N_SITES": 3}
    for name, value in sizes.items():
        monkeypatch.setattr(checks, name, value)
    rows = [*checks.check_vocabulary("cpu"), *checks.check_dense("cpu", dtype=torch.float32)]
    assert len(rows) == 6
    assert [row for row in rows if not row["passed"]] == []
    assert max(row["error"] for row in rows) < 2e-6
    monkeypatch.setattr(checks, "merge_site", lambda weight, *_, **__: weight * torch.nan)
    assert not checks.check_dense("cpu", dtype=torch.float32)[1]["passed"]


def test_a_prompt_has_a_floor_above_its_bar():
    # In 16 bits, and with one plane of int8 at twice the rate.
    assert prefill_floor(1) == pytest.approx(1.526, abs=1e-3)
    assert prefill_floor(2) == pytest.approx(1.263, abs=1e-3)
    (bar,) = (row for row in judge({}) if "floor" in row)
    assert bar["target"] < prefill_floor(2) < bar["floor"] == prefill_floor(1)


def test_a_table_keeps_the_launches_that_were_not_measured_again(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    shape = {"blocks": 1, "along_steps": 4, "along_rows": 1, "ahead": 2}
    sizes = {"stage": "shrink", "tokens": 1, "steps": 8, "rows": 64}
    row = sizes | {"site": "o", "shape": shape, "us": 3.0}
    other = row | {"tokens": 8}
    old = {"choices": [row, other], "measured": [row, other]}
    merged = tune.merge_tables(old, [row | {"us": 2.0}])
    assert [choice["us"] for choice in merged["choices"]] == [3.0, 2.0]
    assert [measured["tokens"] for measured in merged["measured"]] == [8, 1]
