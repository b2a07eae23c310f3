"""One fine-tune of the quality table, compressed and measured."""

import json

import torch

from benchmarks.quality.measure import BenchOptions
from benchmarks.quality.run import CANDIDATES, PARTS, Candidate, FineTune

_OPTIONS = BenchOptions(
    device="cpu", n_items=6, text_rows=2, text_tokens=64, greedy_tokens=16, dtype=torch.float32
)


def test_rows_have_sizes_and_parts_and_are_kept_by_the_next_run(tiny, tmp_path):
    base, tuned = tiny
    (tmp_path / tuned.name).symlink_to(tuned)
    out = tmp_path / "rows.json"
    candidate = Candidate(method="datafree", ratio=8)
    first = FineTune(base, tmp_path, tuned.name, options=_OPTIONS, out=out)
    assert not first.has(candidate)
    first.run(candidate)
    rows = json.loads(out.read_text())
    assert [row["method"] for row in rows] == ["backbone", "fine-tune", "datafree"]
    made = rows[-1]
    assert 8.0 <= made["ratio"] < 8.0 * 1.01
    assert (made["budget"], made["calibration"]) == ("1/8", "none")
    # Nothing but the matrices and the vocabulary was rounded, so either alone loses something.
    assert made["kl_text_matrices"] > 1e-3
    assert made["kl_text_vocabulary"] > 1e-3
    assert max(made["kl_text_matrices"], made["kl_text_vocabulary"]) < made["kl_text"]
    assert all(rows[0][part] is None for part in PARTS)

    second = FineTune(base, tmp_path, tuned.name, options=_OPTIONS, out=out)
    assert second.has(candidate)
    assert not second.has(Candidate(method="datafree", ratio=16))
    assert json.loads(out.read_text()) == rows


def test_no_candidate_is_asked_for_twice():
    assert len(set(CANDIDATES)) == len(CANDIDATES)
