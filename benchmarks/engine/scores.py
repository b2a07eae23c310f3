"""Exact match of deltas as the engine serves them, in either precision, beside dense checkpoints.

    python -m benchmarks.engine.scores --base BASE_DIR --tuned DIR … --out OUT.json

A fine-tune's folder has `evaluation.jsonl` and `calibration.jsonl` beside its weights, as those of
benchmarks.quality.train have. Its delta is of the default recipe with its own text; all deltas
answer in common steps of one engine, and the same delta rebuilt is scored as `deltacome evaluate`
does.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.loop import Loop
from benchmarks.engine.tenants import BACKBONE, share_tenants
from benchmarks.engine.timing import describe_machine
from deltacome_core.budget import Budget
from deltacome_core.compress import compress_checkpoint
from deltacome_core.evaluate import (
    MAX_NEW_TOKENS,
    EvalReport,
    compare_hits,
    evaluate_exact_match,
    is_hit,
    read_evaluation,
)
from deltacome_core.models import load_model, load_tokenizer
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import reconstruct_checkpoint
from deltacome_core.texts import TextItem
from kernels.fragments import PRECISIONS
from workers.engine.model import LoadedModel

KV_BYTES = 1 << 30
DELTA_BYTES = 1 << 30
Items = Mapping[str, tuple[TextItem, ...]]


def make_deltas(
    base: Path, tuned: Sequence[Path], made: Path, *, ratio: float | None, device: str
) -> dict[str, Path]:
    """Deltas of the default recipe by fine-tune; those that are there already stay."""
    budget = None if ratio is None else Budget(ratio=ratio)
    for folder in tuned:
        if not (made / folder.name).exists():
            compress_checkpoint(
                base,
                folder,
                made / folder.name,
                get_recipe("hub"),
                budget=budget,
                calibration=folder / "calibration.jsonl",
                device=device,
            )
    return {folder.name: made / folder.name for folder in tuned}


def answer_items(models: Mapping[str, LoadedModel], items: Items) -> dict[str, list[str]]:
    """Greedy answers of all tenants, asked in turns so that steps have tokens of many."""
    asked = [
        (name, number)
        for number in range(max(map(len, items.values())))
        for name in models
        if number < len(items[name])
    ]
    prompts = [
        (models[name], models[name].tokenizer.encode(items[name][number].prompt))
        for name, number in asked
    ]
    with Loop() as loop:
        heard = loop.answer(prompts, MAX_NEW_TOKENS)
    answers: dict[str, list[str]] = {name: [] for name in models}
    for (name, _), one in zip(asked, heard, strict=True):
        ids = [token for token in one.ids if token not in models[name].eos_ids]
        answers[name].append(models[name].tokenizer.decode(ids, skip_special_tokens=True))
    return answers


def grade(items: Sequence[TextItem], answers: Sequence[str]) -> EvalReport:
    return EvalReport(
        hits=tuple(is_hit(text, item.answer) for item, text in zip(items, answers, strict=True))
    )


def score_rebuilt(
    base: Path, delta: Path, items: Sequence[TextItem], *, device: str, scratch: Path
) -> EvalReport:
    rebuilt = scratch / f"{delta.name}-rebuilt"
    reconstruct_checkpoint(base, delta, rebuilt, device=device)
    model = load_model(rebuilt, device=device)
    return evaluate_exact_match(model, load_tokenizer(rebuilt), items)


def score_all(
    base: Path, deltas: Mapping[str, Path], items: Items, *, device: str, scratch: Path
) -> dict[str, Any]:
    """Scores by fine-tune: of each precision and of the rebuilt checkpoint, and how they differ."""
    answers = {}
    for precision in PRECISIONS:
        models = share_tenants(
            base,
            deltas,
            device=device,
            precision=precision,
            n_slots=len(deltas),
            kv_bytes=KV_BYTES,
            delta_bytes=DELTA_BYTES,
        )
        del models[BACKBONE]
        answers[precision] = answer_items(models, items)
    rows = {}
    for name, delta in deltas.items():
        reports = {kind: grade(items[name], found[name]) for kind, found in answers.items()}
        reports["rebuilt"] = score_rebuilt(base, delta, items[name], device=device, scratch=scratch)
        both = zip(answers["exact"][name], answers["fast"][name], strict=True)
        rows[name] = {
            **{kind: {"score": r.accuracy, "score_se": r.se} for kind, r in reports.items()},
            "items": len(items[name]),
            "same_answers": sum(a == b for a, b in both),
            "fast_beside_exact": asdict(compare_hits(reports["exact"], reports["fast"])),
            "exact_beside_rebuilt": asdict(compare_hits(reports["rebuilt"], reports["exact"])),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine.scores",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--tuned", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--made", type=Path, help="where the deltas are, or will be, kept")
    parser.add_argument("--ratio", type=float, help="of whole files; else the recipe's own sizes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--items", type=int, default=400)
    args = parser.parse_args()
    items = {
        folder.name: read_evaluation(folder / "evaluation.jsonl")[: args.items]
        for folder in args.tuned
    }
    with tempfile.TemporaryDirectory() as scratch:
        made = args.made or Path(scratch) / "deltas"
        made.mkdir(parents=True, exist_ok=True)
        deltas = make_deltas(args.base, args.tuned, made, ratio=args.ratio, device=args.device)
        rows = score_all(args.base, deltas, items, device=args.device, scratch=Path(scratch))
    record = describe_machine(args.device) | {"ratio": args.ratio, "rows": rows}
    text = json.dumps(record, indent=1) + "\n"
    print(text)
    args.out.write_text(text)


if __name__ == "__main__":
    main()
