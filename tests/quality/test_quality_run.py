"""One fine-tune of the quality table, compressed and measured."""

import json

import torch
from source_tree import ROOT

from benchmarks.quality.measure import BenchOptions
from benchmarks.quality.run import CLAIMS, FineTune
from benchmarks.quality.table import (
    CANDIDATES,
    COLUMNS,
    PARTS,
    Candidate,
    keep_rows,
    read_task,
    write_table,
)

_OPTIONS = BenchOptions(
    device="cpu", n_items=6, text_rows=2, text_tokens=64, greedy_tokens=16, dtype=torch.float32
)


def test_rows_have_sizes_and_parts_and_are_kept_by_the_next_run(tiny, tmp_path):
    base, tuned = tiny
    (tmp_path / tuned.name).symlink_to(tuned)
    out = tmp_path / "rows"
    (out / CLAIMS).mkdir(parents=True)
    candidate = Candidate(method="datafree", ratio=8)
    first = FineTune(base, tmp_path, tuned.name, options=_OPTIONS, out=out)
    assert first.take(candidate)
    first.run(candidate)
    rows = json.loads((out / f"{tuned.name}.0.json").read_text())
    assert [row["method"] for row in rows] == ["backbone", "fine-tune", "datafree"]
    made = rows[-1]
    assert 8.0 <= made["ratio"] < 8.0 * 1.01
    assert (made["budget"], made["calibration"]) == ("1/8", "none")
    # Nothing but the matrices and the vocabulary was rounded, so either alone loses something.
    assert made["kl_text_matrices"] > 1e-3
    assert made["kl_text_vocabulary"] > 1e-3
    assert max(made["kl_text_matrices"], made["kl_text_vocabulary"]) < made["kl_text"]
    assert all(rows[0][part] is None for part in PARTS)
    assert all(set(row) == set(COLUMNS) for row in rows)
    assert 0 < made["kl_task_se"] < made["kl_task"]

    second = FineTune(base, tmp_path, tuned.name, options=_OPTIONS, out=out)
    assert second.has(candidate)
    assert not second.has(Candidate(method="datafree", ratio=16))
    assert read_task(out, tuned.name) == rows


def test_parts_of_a_fine_tune_take_what_no_other_has_taken(tiny, tmp_path):
    base, tuned = tiny
    (tmp_path / tuned.name).symlink_to(tuned)
    out = tmp_path / "rows"
    (out / CLAIMS).mkdir(parents=True)
    parts = [
        FineTune(base, tmp_path, tuned.name, options=_OPTIONS, out=out, part=part)
        for part in (0, 1)
    ]
    whole, small = Candidate(method="datafree", ratio=8), Candidate(method="bitdelta")
    assert parts[0].take(whole)
    assert not parts[1].take(whole)
    assert parts[1].take(small)
    parts[1].run(small)
    assert not parts[0].take(small)
    assert [row["method"] for row in read_task(out, tuned.name)] == [
        "backbone",
        "fine-tune",
        "bitdelta",
    ]


def test_the_committed_table_is_kept_whole_by_a_run_that_measures_nothing(tmp_path):
    table = ROOT / "docs/benchmarks/quality.csv"
    keep_rows(table, tmp_path)
    write_table(tmp_path)
    for name in ("quality.csv", "quality.svg"):
        assert (tmp_path / name).read_text() == table.with_name(name).read_text()
    # What a run has measured itself is not put back.
    own = read_task(tmp_path, "code")[:1]
    (tmp_path / "code.0.json").write_text(json.dumps(own))
    keep_rows(table, tmp_path)
    assert read_task(tmp_path, "code") == own


def test_no_candidate_is_asked_for_twice():
    assert len(set(CANDIDATES)) == len(CANDIDATES)
