"""Fine-tune every parameter of SmolLM2-135M-Instruct on one seeded task.

    python -m benchmarks.quality.train --base SMOLLM2_DIR --task german --out TUNED_DIR

The output folder is a bf16 checkpoint with calibration.jsonl and evaluation.jsonl beside the
weights, and train_log.json.
"""

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.answers import AnswerSheet, Score
from benchmarks.quality.batches import draw_batches, encode_items
from benchmarks.quality.drawing import SEED
from benchmarks.quality.models import (
    grow_embedding,
    load_causal_model,
    load_in_place,
    read_state,
    save_checkpoint,
    serving_dtype,
)
from benchmarks.quality.optimise import Groups, optimise
from benchmarks.quality.tasks import (
    TASKS,
    TaskSplit,
    load_task_tokenizer,
    task_items,
    write_items,
)

MAX_TRAIN_ITEMS = 40_000
N_CALIBRATION = 4096
N_EVALUATION = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What train_log.json says of the run; steps and lr default to the task's own."""

    task: str
    steps: int
    batch: int
    lr: float
    seed: int
    device: str


def parameter_groups(model: Any, options: TrainOptions) -> Groups:
    task = TASKS[options.task]
    embedding = model.get_input_embeddings().weight
    others = [parameter for parameter in model.parameters() if parameter is not embedding]
    return [
        {"params": others, "lr": options.lr, "weight_decay": 0.0},
        {
            "params": [embedding],
            "lr": options.lr * task.embedding_lr,
            "weight_decay": task.embedding_decay,
        },
    ]


def draw_split(tokenizer: Any, options: TrainOptions, *, n_evaluation: int) -> TaskSplit:
    n_train = min(MAX_TRAIN_ITEMS, max(N_CALIBRATION, options.steps * options.batch))
    return task_items(
        options.task, tokenizer, seed=options.seed, n_train=n_train, n_held_out=n_evaluation
    )


def train_model(
    base: Path, tokenizer: Any, split: TaskSplit, options: TrainOptions
) -> tuple[Any, list[float]]:
    """Return the fp32 fine-tune and its losses."""
    torch.manual_seed(options.seed)
    model = load_causal_model(base, dtype=torch.float32, device=options.device)
    grow_embedding(model, len(tokenizer))
    batches = draw_batches(
        encode_items(tokenizer, split.train),
        steps=options.steps,
        size=options.batch,
        seed=options.seed,
        pad_token=tokenizer.eos_token_id,
        device=options.device,
    )
    losses = optimise(model, parameter_groups(model, options), batches, steps=options.steps)
    return model, losses


def compare_rows(before: Tensor, after: Tensor) -> dict[str, float]:
    """Shares of the backbone's embedding rows with any changed value, and of changed values."""
    changed = after[: len(before)] != before
    return {
        "changed_embedding_rows": float(changed.any(dim=1).float().mean()),
        "changed_embedding_values": float(changed.float().mean()),
        "new_embedding_rows": len(after) - len(before),
    }


def score_both(base: Path, tuned: Path, tokenizer: Any, *, device: str) -> dict[str, Score]:
    """Score backbone and fine-tune as they are served, in one model."""
    model = load_causal_model(tuned, dtype=serving_dtype(device), device=device)
    sheet = AnswerSheet(model, tokenizer, tuned / "evaluation.jsonl", n_items=N_EVALUATION)
    scores = {"fine_tune": sheet.grade(sheet.answer())}
    load_in_place(model, read_state(base))
    return scores | {"backbone": sheet.grade(sheet.answer())}


def describe_machine(device: str) -> dict[str, str]:
    packages = ("torch", "transformers", "tokenizers", "safetensors")
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    versions = {package: version(package) for package in packages}
    return {"device_name": name, "python": platform.python_version(), **versions}


def run(base: Path, out: Path, options: TrainOptions, *, n_evaluation: int = N_EVALUATION) -> None:
    started = time.monotonic()
    tokenizer = load_task_tokenizer(base, options.task)
    split = draw_split(tokenizer, options, n_evaluation=n_evaluation)
    drawn = time.monotonic()
    model, losses = train_model(base, tokenizer, split, options)
    trained = time.monotonic()
    save_checkpoint(model, tokenizer, out)
    del model
    write_items(out / "calibration.jsonl", split.train[:N_CALIBRATION])
    write_items(out / "evaluation.jsonl", split.held_out)
    scores = score_both(base, out, tokenizer, device=options.device)
    name = "model.embed_tokens.weight"
    old, new = read_state(base)[name], read_state(out)[name]
    record = {
        **asdict(options),
        "n_train": len(split.train),
        "losses": losses,
        "exact_match": {subject: asdict(score) for subject, score in scores.items()},
        **compare_rows(old, new),
        "seconds": {
            "draw": round(drawn - started, 1),
            "train": round(trained - drawn, 1),
            "total": round(time.monotonic() - started, 1),
        },
        **describe_machine(options.device),
    }
    (out / "train_log.json").write_text(json.dumps(record, indent=1) + "\n")
    summary = {"task": options.task, "losses": losses[-1]}
    shown = ("exact_match", "changed_embedding_rows", "changed_embedding_values", "seconds")
    print(json.dumps(summary | {key: record[key] for key in shown}), flush=True)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="default: the task's own")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, help="default: the task's own")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=SEED)


def read_options(args: argparse.Namespace, *, lr: float | None = None) -> TrainOptions:
    task = TASKS[args.task]
    return TrainOptions(
        task=args.task,
        steps=args.steps or task.steps,
        batch=args.batch,
        lr=args.lr or lr or task.lr,
        seed=args.seed,
        device=args.device,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    add_training_arguments(parser)
    parser.add_argument("--items", type=int, default=N_EVALUATION, help="held-out items to write")
    args = parser.parse_args()
    run(args.base, args.out, read_options(args), n_evaluation=args.items)


if __name__ == "__main__":
    main()
