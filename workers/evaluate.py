"""Task scores of backbone, fine-tune and delta: same items, same harness."""

import gc
import json
import random
from collections.abc import Sequence
from typing import Any

from deltacome_core.evaluate import (
    EvalReport,
    evaluate_exact_match,
    read_evaluation,
    summarise_subjects,
)
from deltacome_core.models import load_model, load_tokenizer
from deltacome_core.texts import TextItem
from workers.devices import pick_device
from workers.engine.model import load_backbone, load_delta
from workers.report import Report
from workers.spec import StepSpec

ITEMS_NAME = "evaluation.jsonl"
REPORT_NAME = "evaluation.json"
MAX_ITEMS = 200
SUBJECTS = ("backbone", "finetune", "delta")


def run(spec: StepSpec, report: Report) -> dict[str, Any]:
    """Score the three subjects on the uploaded items; without items there are no scores."""
    path = spec.tuned / ITEMS_NAME
    if not path.exists():
        return {"scores": []}
    items = choose_items(read_evaluation(path))
    reports: dict[str, EvalReport] = {}
    for done, subject in enumerate(SUBJECTS, start=1):
        model, tokenizer = _load(subject, spec)
        reports[subject] = evaluate_exact_match(model, tokenizer, items)
        report.progress(done=done, total=len(SUBJECTS), subject=subject)
        del model
        gc.collect()
    summary = summarise_subjects(reports)
    (spec.reports / REPORT_NAME).write_text(json.dumps(summary))
    return {
        "scores": [
            {
                "task": "exact match",
                "subject": subject,
                "accuracy": found.accuracy,
                "n": found.n,
                "se": found.se,
            }
            for subject, found in reports.items()
        ]
    }


def choose_items(items: Sequence[TextItem]) -> Sequence[TextItem]:
    """Take a long list down to MAX_ITEMS, the same ones each time."""
    if len(items) <= MAX_ITEMS:
        return items
    chosen = random.Random(0).sample(range(len(items)), MAX_ITEMS)  # noqa: S311 (a fixed draw)
    return [items[index] for index in sorted(chosen)]


def _load(subject: str, spec: StepSpec) -> tuple[Any, Any]:
    """The delta runs from its packed bytes, as the engine serves it."""
    device = pick_device(spec.device)
    tokenizer = load_tokenizer(spec.tuned, spec.backbone)
    if subject == "finetune":
        return load_model(spec.tuned, device=device), tokenizer
    backbone = load_backbone(spec.backbone, device=device)
    if subject == "backbone":
        return backbone.module, tokenizer
    delta = load_delta(backbone, spec.backbone, spec.made, factor_bytes=1 << 62)
    return delta.module, tokenizer
