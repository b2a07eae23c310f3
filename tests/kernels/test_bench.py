import json
import subprocess
import sys

import pytest
import torch
from source_tree import ROOT

import kernels.arena
import kernels.triton_ops.launch_batch as launches
import kernels.triton_ops.unfold
from deltacome_core.bands import plan_bands
from deltacome_core.layout import RankBand
from deltacome_core.packed import PackedMatrix
from deltacome_core.recipe import get_recipe
from kernels import reference, serving, tune
from kernels.bench import __main__ as bench
from kernels.bench import baselines, chart, checks, models, products, sections
from kernels.bench.bars import TARGETS, judge, prefill_floor
from kernels.bench.correctness import BatchCase, cover_case, list_cases, run_case
from kernels.image import build_image
from kernels.tuning import choose_shape

REPORT = ROOT / "docs/benchmarks/kernels.json"


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


def test_the_committed_report_has_every_bar_and_its_chart():
    report = json.loads(REPORT.read_text())
    assert [bar["name"] for bar in report["bars"]] == list(TARGETS)
    assert report["bars"] == judge(report["rows"])
    assert {"device", "versions", "commit", "ceilings", "rows"} <= set(report)
    assert REPORT.with_suffix(".svg").read_text() == chart.draw(report)


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
    sizes = {"stage": "expand", "groups": 8, "steps": 27, "rows": 64}
    slow = sizes | {"shape": shape | {"ahead": 4}, "us": 3.0}
    fast = slow | {"shape": shape, "us": 2.0}
    (chosen,) = tune.choose([slow, fast, fast])
    # The same shape at two sites counts twice: 4 against 3.
    assert (chosen["shape"], chosen["us"]) == (slow["shape"], 3.0)
    assert tune.choose([slow, fast])[0]["shape"] == shape


def test_cases_of_a_device_mix_recipes_and_precisions():
    cases = list(list_cases())
    assert len(set(map(str, cases))) == len(cases)
    assert {case.planes for case in cases} == {2, 4}
    assert any(len({layout.name for layout in case.layouts}) == 3 for case in cases)
    assert any(case.outliers for case in cases)
    for case in cases:
        for layout in case.layouts:
            bands = [layout.bands(out, case.width) for out in case.outs]
            assert all(bands) != bool(layout.direct_bits), (str(case), layout.name)


class Recorder:
    """Stands in for kernels: notes what Triton would compile for a launch, and may run it."""

    def __init__(self, monkeypatch, *, runs=False):
        self.seen = []
        for name in ("prepare", "repack", "batch_shrink", "batch_expand", "layer"):
            kernel = getattr(launches, f"{name}_kernel")
            is_slow = name not in {"prepare", "repack"}
            monkeypatch.setattr(launches, f"{name}_kernel", _Stand(self, kernel, is_slow, runs))

    def take(self):
        """The distinct launches since the last call."""
        seen, self.seen = self.seen, []
        return set(seen)


class _Stand:
    def __init__(self, recorder, kernel, is_slow, runs):
        self.recorder, self.kernel, self.is_slow, self.runs = recorder, kernel, is_slow, runs

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            if self.is_slow:
                types = tuple(getattr(one, "dtype", type(one)) for one in arguments)
                key = (self.kernel.fn.__name__, types, tuple(sorted(constants.items())))
                self.recorder.seen.append(key)
            if self.runs:
                self.kernel[grid](*arguments, **constants)

        return launch


def launch_case(case):
    """What `run_case` launches on a device, where a layer is not the sum that it is on a CPU."""
    plan = products.plan_case(case, "cpu")
    x = torch.zeros(len(case.slots), case.width).bfloat16()
    y = torch.zeros(len(case.slots), sum(case.outs))
    serving.add_delta(y, x, plan, 0)
    serving.add_delta(y.bfloat16(), x, plan, 0)
    weight = torch.zeros(sum(case.outs), case.width).bfloat16()
    shape = serving.choose_layer(weight, plan, 0)
    if shape is not None:
        serving.multiply_layer(x, weight, None, plan, 0, shape)
    else:
        serving._launch_first(x, plan, 0)
        serving._launch_last(y.bfloat16(), plan, 0, overlap=False)


def test_the_arena_of_a_case_takes_all_of_its_deltas():
    case = next(case for case in list_cases() if len(set(case.layouts)) == 3)
    spec = cover_case(case)
    for seed, layout in enumerate(case.layouts, start=1):
        spec.check(build_image(spec.sites, models.Pool(seed).delta(spec.sites, layout)))


def test_what_the_cases_launch_is_compiled_once_each(monkeypatch):
    monkeypatch.setattr(launches, "current_arch", lambda: 90)
    monkeypatch.setattr(launches, "is_compiled", lambda: True)
    recorder = Recorder(monkeypatch)
    cases = list(list_cases())
    for case in cases:
        launch_case(case)
    wanted = recorder.take()
    assert {name for name, *_ in wanted} == {
        "batch_shrink_kernel",
        "batch_expand_kernel",
        "layer_kernel",
    }
    compilations = bench.list_compilations()
    costs = []
    for number, product in compilations:
        plan = products.plan_case(cases[number], "cpu")
        chosen = list(products.list_products(plan, 0))[product]
        products.compile_product(chosen, plan, 0)
        costs.append(chosen.cost)
    assert len(compilations) == len(wanted)
    assert recorder.take() == wanted
    assert costs == sorted(costs, reverse=True)


def test_products_of_a_case_leave_nothing_to_compile(monkeypatch):
    monkeypatch.setattr(kernels.arena, "_REPACK_PROGRAMS", 1)
    recorder = Recorder(monkeypatch, runs=True)
    few = models.Layout(
        name="few",
        square=(),
        wide=(RankBand(2, 5),),
        group_v=(1, 0),
        group_u=(0, 1),
        symmetric=True,
    )
    case = BatchCase(layouts=(few, few), slots=(0, -1), outs=(17,), width=40, planes=2)
    assert run_case(case, "cpu")["passed"]
    wanted = recorder.take()
    plan = products.plan_case(case, "cpu")
    for product in products.list_products(plan, 0):
        products.compile_product(product, plan, 0)
    assert recorder.take() == wanted
    assert len(wanted) == 3


def test_layers_of_lone_tokens_are_compiled_before_they_are_timed(monkeypatch):
    monkeypatch.setattr(bench, "current_arch", lambda: 90)
    sites = models.LLAMA_7B.sites()[:4]
    needed = {
        choose_shape("layer", groups=1, steps=site.input_steps, rows=site.total_out, arch=90)
        for site in sites
    }
    for section, layout in (("decode", models.HUB), ("decode_come", models.COME)):
        listed = bench.list_kernels(frozenset({section}))
        assert {one[0] for one in listed} == {layout}
        assert {one[2] for one in listed if one[1] == "layer"} >= needed


def test_a_product_that_is_late_costs_no_other_case_its_result(monkeypatch):
    asked = []

    def ask(arguments, limit_s):
        asked.append(arguments)
        if "--product" in arguments:
            raise subprocess.TimeoutExpired("compiler", limit_s)
        if arguments == ["--case", "7"]:
            raise subprocess.TimeoutExpired("case", limit_s)
        return "" if arguments == ["--case", "8"] else json.dumps({"passed": True})

    monkeypatch.setattr(bench, "_ask_process", ask)
    rows = bench.check_correctness(60.0)
    n_products = len(bench.list_compilations())
    assert all("--product" in arguments for arguments in asked[:n_products])
    assert sorted(asked[n_products:]) == sorted(["--case", str(n)] for n in range(len(rows)))
    missed = {row["exception"] for row in rows if not row["passed"]}
    assert missed == {"not compiled in time", "ended without a result"}
    assert [number for number, row in enumerate(rows) if not row["passed"]] == [7, 8]


def test_rows_prompts_and_merging_are_checked(monkeypatch):
    monkeypatch.setattr(kernels.arena, "_REPACK_PROGRAMS", 1)
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
    sizes = {"stage": "shrink", "groups": 1, "steps": 8, "rows": 64}
    row = sizes | {"site": "o", "shape": shape, "us": 3.0}
    other = row | {"groups": 8}
    old = {"choices": [row, other], "measured": [row, other]}
    merged = tune.merge_tables(old, [row | {"us": 2.0}])
    assert [choice["us"] for choice in merged["choices"]] == [3.0, 2.0]
    assert [measured["groups"] for measured in merged["measured"]] == [8, 1]
