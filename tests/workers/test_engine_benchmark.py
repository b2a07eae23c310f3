"""What the benchmark makes of its rows; the engine itself is measured, not tested, there."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from benchmarks.engine.bars import judge
from benchmarks.engine.chart import draw
from benchmarks.engine.cold import store_canary, time_cold, time_raw
from benchmarks.engine.large import TRIAL, draw_rows, fill, open_large, write_files
from benchmarks.engine.loop import Heard, Loop, rate
from benchmarks.engine.scores import make_deltas, score_all
from benchmarks.engine.trace import draw_trace
from deltacome_core.evaluate import read_evaluation
from deltacome_core.held_files import HeldFiles
from kernels.bench.models import Pool
from workers.engine.model import load_shared
from workers.engine.shared import SharedExecutor


def make_rows(**memory):
    row = {"tokens_per_s": 1000.0, "layers_ms": 10.0}
    return {
        "decode_32": row,
        "decode_1": {"tokens_per_s": 1500.0, "layers_ms": 6.0},
        "all_tenants": {"tenants": 64, "memory": memory},
    }


def test_bars_are_judged_from_the_rows_there_are():
    bars = judge(make_rows(device_used_bytes=79e9, forecast={"total_bytes": 78e9}))
    found = {bar["name"]: bar for bar in bars}
    factor = found["32 tenants over one tenant x kernels' own factor"]
    assert factor["measured"] == pytest.approx(1000 / 1500 * 10 / 6)
    assert factor["met"]
    assert found["memory against the forecast, relative error"]["met"]
    assert "64 registered over 8, same batch" not in found


def test_memory_beyond_the_budget_or_without_a_device_meets_no_bar():
    beyond = judge(make_rows(device_used_bytes=81e9, forecast={"total_bytes": 78e9}))
    assert not next(bar for bar in beyond if bar["name"].startswith("tenants"))["met"]
    none = judge(make_rows(device_used_bytes=0, forecast={"total_bytes": 78e9}))
    assert not any(bar["name"].startswith("memory") for bar in none)


def test_a_rate_counts_only_while_all_answers_run():
    one = Heard(submitted_s=0.0, ids=[1, 2, 3], times=[1.0, 2.0, 3.0])
    late = Heard(submitted_s=0.0, ids=[1, 2, 3], times=[2.0, 3.0, 4.0])
    found = rate([one, late])
    assert found["tokens_per_s"] == 2
    assert found["step_ms"] == 1000
    assert found["first_token_ms"] == 1500


def test_a_trace_is_the_same_every_time_and_favours_the_first_tenants():
    options = {"rate_per_s": 50.0, "seconds": 10.0, "n_tenants": 8, "vocabulary": 100}
    trace = draw_trace(**options)
    assert trace == draw_trace(**options)
    tenants = [request.tenant for request in trace]
    assert tenants.count(0) > 3 * tenants.count(7)
    assert all(0 < a.at_s < b.at_s < 10 for a, b in itertools.pairwise(trace))


def test_the_delta_of_the_benchmark_is_one_the_engine_takes(tmp_path):
    large, check = open_large(tmp_path, TRIAL, "cpu")
    assert check == "passed"
    write_files(large)
    model = load_shared(large.model, large.base, large.delta, factor_bytes=0)
    fill(large, model.slot)
    assert large.slots._arena.resident_slots == list(range(TRIAL.n_tenants))


def test_the_timeline_of_a_cold_load_has_its_checks_before_its_answer(tmp_path):
    large, _ = open_large(tmp_path, TRIAL, "cpu")
    write_files(large)
    store_canary(large)
    functions = HeldFiles.check, SharedExecutor.forward
    with Loop() as loop:
        found = time_cold(large, loop, from_disk=True)
    assert (HeldFiles.check, SharedExecutor.forward) == functions
    assert found["canary"].startswith("applied")
    at = found["timeline"]
    assert at["read_blocks"]["begins_ms"] <= at["hash"]["ends_ms"] <= at["canary"]["begins_ms"]
    assert at["canary"]["ends_ms"] <= at["answer"]["begins_ms"]
    # The canary's step and that of the prompt.
    assert at["forward"]["calls"] == 2
    assert large.slots._arena.resident_slots == []
    assert {"1", "2", "4", "8"} == time_raw(large).keys()


def test_tenants_are_scored_on_their_own_items_in_common_steps(tmp_path):
    examples = Path(__file__).parents[2] / "examples" / "tiny-llama"
    tuned = [examples / "dates", examples / "extraction"]
    made = tmp_path / "made"
    made.mkdir()
    deltas = make_deltas(examples / "backbone", tuned, made, ratio=None, device="cpu")
    items = {folder.name: read_evaluation(folder / "evaluation.jsonl")[:6] for folder in tuned}
    # One has fewer questions than the other.
    items["dates"] = items["dates"][:4]
    rows = score_all(examples / "backbone", deltas, items, device="cpu", scratch=tmp_path)
    for name, row in rows.items():
        assert row["items"] == row["same_answers"] == len(items[name])
        assert row["exact"]["score"] == 1
        assert row["exact_beside_rebuilt"]["lost"] == row["exact_beside_rebuilt"]["gained"] == 0


def test_every_row_of_a_vocabulary_changed():
    rows = draw_rows("head", (512, 64), Pool(0), torch.Generator().manual_seed(0))
    assert rows.dequantise().abs().sum(dim=1).gt(0).all()


def test_the_chart_shows_the_committed_report():
    folder = Path(__file__).parents[2] / "docs" / "benchmarks"
    report = json.loads((folder / "engine.json").read_text())
    assert draw(report) == (folder / "engine.svg").read_text()
