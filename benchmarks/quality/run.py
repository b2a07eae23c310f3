"""Compress every fine-tune of the benchmark by every recipe and measure what is left.

    python -m benchmarks.quality.run --base SMOLLM2_DIR --work DIR --out DIR --device cuda

Trains the fine-tunes that are not in the work folder yet, then measures them, some side by side,
each in one or several parts that take what no other has taken. Rows already in the out folder, or
in a table given by --keep, are kept, so a run that was cut off goes on where it stopped.
Candidates are rebuilt and compared in fp32: rounding to bf16 would hide the small ones.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from benchmarks.quality.drawing import SEED
from benchmarks.quality.lora import train_lora
from benchmarks.quality.measure import Bench, BenchOptions, Measurement
from benchmarks.quality.models import State, read_state
from benchmarks.quality.sample import sample_texts
from benchmarks.quality.table import (
    CANDIDATES,
    PARTS,
    Candidate,
    keep_rows,
    read_rows,
    read_task,
    write_table,
)
from benchmarks.quality.tasks import TASKS, write_items
from benchmarks.quality.train import TrainOptions
from deltacome_core.budget import Budget
from deltacome_core.compress import compress_checkpoint
from deltacome_core.inspection import inspect_delta
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import reconstruct_checkpoint
from deltacome_core.texts import DEFAULT_CALIBRATION

VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
# What parts have taken, beside their rows; a new run begins with none.
CLAIMS = "claims"


class FineTune:
    """One fine-tune, its bench and the rows that this part has measured so far."""

    def __init__(
        self, base: Path, work: Path, task: str, *, options: BenchOptions, out: Path, part: int = 0
    ) -> None:
        self._base, self._task, self._device = base, task, options.device
        self._folder, self._out = out, out / f"{task}.{part}.json"
        self._tuned = work / task
        self._scratch = work / f"scratch-{task}-{part}"
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True)
        self._bench = Bench(self._tuned, base, options)
        self._rows: list[dict[str, Any]] = read_rows(self._out)
        if not self._rows and part == 0:
            self._add(Candidate(method="backbone"), self._bench.backbone, size={})
            self._add(Candidate(method="fine-tune"), self._bench.reference, size={})

    def _add(
        self,
        candidate: Candidate,
        found: Measurement,
        *,
        size: dict[str, Any],
        parts: dict[str, float] | None = None,
    ) -> None:
        self._rows.append(
            {
                "finetune": self._task,
                "method": candidate.method,
                "calibration": candidate.calibration,
                "budget": candidate.budget,
                "total_bytes": size.get("total_bytes"),
                "bits_per_param": size.get("bits_per_param"),
                "ratio": size.get("ratio"),
                "score": found.score,
                "score_se": found.score_se,
                "kl_task": found.kl_task,
                "kl_text": found.kl_text,
                "kl_task_se": found.kl_task_se,
                "kl_text_se": found.kl_text_se,
                "top1": found.top1,
                "recovery": found.recovery,
                "greedy_match": found.greedy_match,
                "greedy_text": found.greedy_text,
                "compress_seconds": size.get("seconds"),
                **dict.fromkeys(PARTS),
                **(parts or {}),
            }
        )
        print(json.dumps(self._rows[-1]), flush=True)
        # Other parts read it at any time.
        fresh = self._out.with_suffix(".new")
        fresh.write_text(json.dumps(self._rows, indent=1) + "\n")
        fresh.replace(self._out)

    def _calibration(self, kind: str) -> Path | None:
        if kind == "general":
            return DEFAULT_CALIBRATION
        if kind == "own":
            return self._tuned / "calibration.jsonl"
        if kind == "none":
            return None
        path = self._scratch / "self.jsonl"
        if not path.exists():
            self._bench.measure(read_state(self._tuned))
            write_items(path, sample_texts(self._bench.model, self._bench.tokenizer))
        return path

    def has(self, candidate: Candidate) -> bool:
        """Whether any part has a row of this candidate, from this run or an earlier one."""
        wanted = (candidate.method, candidate.calibration, candidate.budget)
        rows = read_task(self._folder, self._task)
        return any(wanted == (r["method"], r["calibration"], r["budget"]) for r in rows)

    def take(self, candidate: Candidate) -> bool:
        """Take a candidate, unless it is measured or another part has taken it."""
        if self.has(candidate):
            return False
        name = f"{self._task}-{candidate.method}-{candidate.calibration}-{candidate.ratio}"
        try:
            (self._folder / CLAIMS / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def run(self, candidate: Candidate) -> None:
        """Make one candidate and measure it."""
        if candidate.method == "lora":
            self._run_lora(candidate)
            return
        delta, rebuilt = self._scratch / "delta", self._scratch / "rebuilt"
        report = compress_checkpoint(
            self._base,
            self._tuned,
            delta,
            get_recipe(candidate.method),
            budget=None if candidate.ratio is None else Budget(ratio=candidate.ratio),
            calibration=self._calibration(candidate.calibration),
            device=self._device,
        )
        device = torch.device(self._device)
        reconstruct_checkpoint(self._base, delta, rebuilt, dtype=torch.float32, device=device)
        sizes = inspect_delta(delta)
        size = {
            "total_bytes": sizes.total_bytes,
            "bits_per_param": sizes.bits_per_param,
            "ratio": sizes.ratio,
            "seconds": round(report.seconds, 2),
        }
        state = read_state(rebuilt)
        found = self._bench.measure(state)
        self._add(candidate, found, size=size, parts=self._part(state))
        for folder in (delta, rebuilt):
            shutil.rmtree(folder)

    def _part(self, state: State) -> dict[str, float]:
        """KL of what the matrices lost with an exact vocabulary, and the other way round."""
        tuned = read_state(self._tuned)
        vocabulary = {name for name in state if name.endswith(VOCABULARY)}
        found: dict[str, float] = {}
        for part, names in (("matrices", set(state) - vocabulary), ("vocabulary", vocabulary)):
            mixed = {name: (state if name in names else tuned)[name] for name in state}
            task, text = self._bench.diverge(mixed)
            found |= {f"kl_task_{part}": task.kl, f"kl_text_{part}": text.kl}
        return found

    def _run_lora(self, candidate: Candidate) -> None:
        """Train LoRA to at most the bytes of the budget, the same number of steps."""
        if candidate.ratio is None:
            raise ValueError("LoRA has no size of its own")
        weight_bytes = sum(path.stat().st_size for path in self._tuned.glob("*.safetensors"))
        options = TrainOptions(
            task=self._task,
            steps=TASKS[self._task].steps,
            batch=64,
            lr=1e-3,
            seed=SEED,
            device=self._device,
        )
        result = train_lora(self._base, options, budget_bytes=int(weight_bytes / candidate.ratio))
        n_params = sum(tensor.numel() for tensor in result.state.values())
        found = {
            "total_bytes": result.n_bytes,
            "bits_per_param": result.n_bytes * 8 / n_params,
            "ratio": weight_bytes / result.n_bytes,
        }
        self._add(candidate, self._bench.measure(result.state), size=found)


def measure_one(args: argparse.Namespace) -> None:
    options = BenchOptions(device=args.device, dtype=torch.float32)
    (args.out / CLAIMS).mkdir(exist_ok=True)
    own = FineTune(args.base, args.work, args.only, options=options, out=args.out, part=args.part)
    # Reading a fine-tune and its answers takes as long as a row.
    deadline = time.monotonic() + args.seconds
    for candidate in CANDIDATES:
        if time.monotonic() < deadline and own.take(candidate):
            own.run(candidate)


def run_all(
    commands: dict[str, list[str]], logs: Path, *, at_once: int, devices: Sequence[str]
) -> None:
    """Run each command, some side by side on each GPU; fail if one of them did."""
    free: SimpleQueue[str] = SimpleQueue()
    for _ in range(at_once):
        for device in devices:
            free.put(device)

    def run(name: str) -> None:
        device = free.get()
        seen = {"CUDA_VISIBLE_DEVICES": device} if device else {}
        try:
            with (logs / f"{name}.log").open("w") as log:
                subprocess.run(
                    commands[name],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | seen,
                    check=True,
                )
        finally:
            free.put(device)

    with ThreadPoolExecutor(at_once * len(devices)) as pool:
        list(pool.map(run, commands))


def describe(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    packages = ("torch", "transformers", "safetensors")
    return {"device": name, "versions": {package: version(package) for package in packages}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gpus", nargs="*", default=[""], help="to spread over, as CUDA counts")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--seconds", type=float, default=36000.0)
    parser.add_argument(
        "--train-at-once", type=int, default=3, help="on a GPU; six need over 80 GB"
    )
    parser.add_argument("--measure-at-once", type=int, default=3, help="so do six of these")
    parser.add_argument("--parts", type=int, default=1, help="processes that share a fine-tune")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--keep", type=Path, help="a table whose rows are not measured again")
    parser.add_argument("--commit", default="unknown", help="which code ran")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--part", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only:
        measure_one(args)
        return
    if args.keep:
        keep_rows(args.keep, args.out)
    args.work.mkdir(parents=True, exist_ok=True)
    common = ["--base", str(args.base), "--device", args.device]
    here = [sys.executable, "-m"]
    run_all(
        {
            t: [
                *here,
                "benchmarks.quality.train",
                *common,
                "--task",
                t,
                "--out",
                f"{args.work / t}",
            ]
            for t in args.tasks
            if not (args.work / t / "train_log.json").exists()
        },
        args.work,
        at_once=args.train_at_once,
        devices=args.gpus,
    )
    if args.train_only:
        return
    rest = ["--work", str(args.work), "--out", str(args.out), "--seconds", str(args.seconds)]
    shutil.rmtree(args.out / CLAIMS, ignore_errors=True)
    measure = [*here, "benchmarks.quality.run", *common, *rest]
    run_all(
        {
            f"{task}.{part}": [*measure, "--only", task, "--part", str(part)]
            for part in range(args.parts)
            for task in args.tasks
        },
        args.out,
        at_once=args.measure_at_once,
        devices=args.gpus,
    )
    write_table(args.out)
    record = describe(args.device) | {
        "commit": args.commit,
        "training": {
            t: json.loads((args.work / t / "train_log.json").read_text()) for t in args.tasks
        },
    }
    (args.out / "quality.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
