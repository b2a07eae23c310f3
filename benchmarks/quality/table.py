"""What the quality benchmark measures, and the table of it."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.chart import draw, read_points
from benchmarks.quality.tasks import TASKS

# Columns that are no numbers, and methods without a budget or a delta.
NAMES = ("finetune", "method", "calibration", "budget")
UNCOMPRESSED = ("backbone", "fine-tune")
# Columns of rows that are recipes; the two parts do not add up to the whole.
PARTS = ("kl_task_matrices", "kl_task_vocabulary", "kl_text_matrices", "kl_text_vocabulary")
# Not in rows that were measured before there were any.
ERRORS = ("kl_task_se", "kl_text_se")
COLUMNS = (
    *NAMES,
    "total_bytes",
    "bits_per_param",
    "ratio",
    "score",
    "score_se",
    "kl_task",
    "kl_text",
    "top1",
    "recovery",
    "greedy_match",
    "greedy_text",
    "compress_seconds",
    *PARTS,
    *ERRORS,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A recipe at a ratio of whole files (None: it has one size), and its calibration text.

    "lora" is no recipe: it is trained, to the bytes of the budget.
    """

    method: str
    ratio: float | None = None
    calibration: str = "none"

    @property
    def budget(self) -> str | None:
        return None if self.ratio is None else f"1/{self.ratio:g}"


_CALIBRATED = ("hub", "distilled", "come")
# Distilling takes ten times as long as the others.
_QUICK = ("hub", "come")


def _at(
    ratio: float, calibration: str, *, methods: tuple[str, ...] = _QUICK
) -> tuple[Candidate, ...]:
    return tuple(Candidate(method=m, ratio=ratio, calibration=calibration) for m in methods)


# What is cut off when a run has no more seconds comes last.
CANDIDATES = (
    *_at(16, "own", methods=_CALIBRATED),
    *_at(32, "own", methods=_CALIBRATED),
    *_at(16, "general"),
    *_at(16, "self"),
    *_at(8, "own"),
    Candidate(method="datafree", ratio=16),
    Candidate(method="lowrank", ratio=16),
    Candidate(method="lora", ratio=16, calibration="trained"),
    Candidate(method="bitdelta"),
    Candidate(method="bitdelta-row"),
    *_at(32, "general"),
    Candidate(method="datafree", ratio=32),
    Candidate(method="lowrank", ratio=32),
    *_at(8, "general"),
    Candidate(method="datafree", ratio=8),
    Candidate(method="lowrank", ratio=8),
    *_at(16, "self", methods=("distilled",)),
    *_at(8, "own", methods=("distilled",)),
    Candidate(method="lora", ratio=8, calibration="trained"),
    Candidate(method="lora", ratio=32, calibration="trained"),
)


def keep_rows(table: Path, out: Path) -> None:
    """Put the rows of an earlier table where a run finds them, for tasks that have none there.

    Args:
        table: quality.csv.
        out: folder of the rows.
    """
    kept: dict[str, list[dict[str, Any]]] = {}
    with table.open(newline="") as handle:
        for row in csv.DictReader(handle):
            values = {name: _parse(name, text) for name, text in row.items()}
            kept.setdefault(row["finetune"], []).append(values)
    for task, rows in kept.items():
        if not read_task(out, task):
            (out / f"{task}.0.json").write_text(json.dumps(rows, indent=1) + "\n")


def _parse(name: str, text: str) -> str | int | float | None:
    if not text:
        return None
    if name in NAMES:
        return text
    return int(text) if name == "total_bytes" else float(text)


def write_table(out: Path) -> None:
    """Join the rows of all fine-tunes as quality.csv and draw them."""
    rows = [row for task in TASKS for row in read_task(out, task)]
    with (out / "quality.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    (out / "quality.svg").write_text(draw(read_points(out / "quality.csv")))


def read_task(out: Path, task: str) -> list[dict[str, Any]]:
    """Rows of all parts of a task: those that no recipe made, CANDIDATES, then what was kept."""
    rows = [row for path in sorted(out.glob(f"{task}.*.json")) for row in read_rows(path)]
    order = {(c.method, c.calibration, c.budget): n for n, c in enumerate(CANDIDATES)}

    def place(row: dict[str, Any]) -> int:
        if row["method"] in UNCOMPRESSED:
            return -1
        return order.get((row["method"], row["calibration"], row["budget"]), len(order))

    return sorted(rows, key=place)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of one part; none before its first."""
    return json.loads(path.read_text()) if path.exists() else []
