"""Measure the engine: `python -m benchmarks.engine --out OUT.json [--device cuda]`.

Tokens are compared on the tiny models of examples/ with the rebuilt dense checkpoints. Speed and
memory are measured on a model of Llama-2-7B's shapes with random weights and deltas of random codes
in the default recipe's layout; `--trial` takes small shapes and needs no GPU. Each part has
a limit of time, OUT is written again when it ends, and what has not begun when `--limit` is near is
left out; those that bars are judged by come first.
"""

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.engine import tokens
from benchmarks.engine.bars import judge
from benchmarks.engine.large import SEVEN_B, TRIAL
from benchmarks.engine.session import Session
from benchmarks.engine.timing import describe_machine, used_bytes
from kernels.fragments import PRECISIONS

HELPERS_LIMIT_S = 90
TOKENS_LIMIT_S = 100
# A part with less time than this is not begun.
LEAST_S = 5
# From the end of the time to the end of the process, whatever still runs.
GRACE_S = 5


class Report:
    """Rows, errors and seconds by part, on disk as soon as they are known."""

    def __init__(self, out: Path, device: str, limit_s: float) -> None:
        self._out = out
        self._device = device
        self._ends_s = time.perf_counter() + limit_s
        self.record: dict[str, Any] = describe_machine(device) | {
            "rows": {},
            "errors": {},
            "seconds": {},
            "used_bytes": {},
            "left_out": [],
        }

    @property
    def left_s(self) -> float:
        return self._ends_s - time.perf_counter()

    def measure(self, name: str, limit_s: int, part: Callable[[], Any]) -> None:
        started = time.perf_counter()
        if self.left_s < LEAST_S:
            self.record["left_out"].append(name)
            self.write()
            return
        try:
            with deadline(min(limit_s, int(self.left_s))):
                self.record["rows"][name] = part()
        except Exception as error:  # noqa: BLE001  the other parts still count
            traceback.print_exc()
            self.record["errors"][name] = repr(error)[:500]
        self.record["seconds"][name] = round(time.perf_counter() - started, 1)
        self.record["used_bytes"][name] = used_bytes(self._device)
        print(f"{name}: {json.dumps(self.record['rows'].get(name))[:600]}", flush=True)
        self.write()

    def write(self) -> None:
        self.record["bars"] = judge(self.record["rows"])
        self._out.write_text(json.dumps(self.record, indent=1) + "\n")


@contextmanager
def deadline(limit_s: int) -> Iterator[None]:
    """Raise in this thread when the time is up; what waits for a device or a lock is woken."""

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {limit_s} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def end_after(limit_s: float) -> None:
    """End this process when its time is up: a device that does not answer wakes no signal."""

    def end() -> None:
        time.sleep(limit_s)
        print("the time is up", flush=True)
        os._exit(3)

    threading.Thread(target=end, daemon=True).start()


class Helper:
    """Another process of this benchmark; what it reports is read when it has ended."""

    def __init__(self, args: argparse.Namespace, folder: Path, name: str, *options: str) -> None:
        self._out = folder / f"{name}.json"
        command = [sys.executable, "-m", "benchmarks.engine", "--out", str(self._out)]
        command += ["--device", args.device, "--items", str(args.items), *options]
        command += ["--precision", args.precision]
        command += ["--made", str(args.made)] if args.made else []
        command += ["--trial"] if args.trial else []
        command += ["--limit", str(args.warm_limit)]
        self._process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "4"})

    def wait(self, limit_s: float) -> dict[str, Any]:
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            # Its memory on the device is not free before.
            self._process.wait()
        found: dict[str, Any] = json.loads(self._out.read_text()) if self._out.exists() else {}
        return found


def measure_tokens(args: argparse.Namespace, report: Report, made: Path) -> None:
    for name, exact in (("tokens_fp32", True), ("tokens", False)):
        compare = partial(
            tokens.compare_tokens,
            made,
            args.device,
            n_items=args.items,
            exact=exact,
            precision=args.precision,
        )
        report.measure(name, TOKENS_LIMIT_S, compare)
    if args.device != "cuda" and not args.trial:
        report.measure("loops", 300, lambda: tokens.compare_loops(made, args.device))


def measure_large(args: argparse.Namespace, report: Report, scratch: Path) -> None:
    started = time.perf_counter()
    helpers = [] if args.skip_tokens else [Helper(args, scratch, "tokens", "--part", "tokens")]
    size = replace(
        TRIAL if args.trial else SEVEN_B,
        changes_vocabulary=not args.same_vocabulary,
        precision=args.precision,
    )
    session = Session(size, args.device, scratch)
    report.measure("setup", 120, session.set_up)
    for helper in helpers:
        found = helper.wait(max(1.0, args.warm_limit - (time.perf_counter() - started)))
        for key in ("rows", "errors"):
            report.record[key] |= found.get(key, {})
    report.record["seconds"]["helpers"] = round(time.perf_counter() - started, 1)
    for name, limit_s, part in session.parts():
        if args.only and name not in args.only:
            continue
        report.measure(name, limit_s, part)
        if name in report.record["errors"]:
            # Answers of a part that did not end must not run beside the next one.
            session.renew_loop()
    session.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--made", type=Path, help="where the tiny deltas are, or will be, kept")
    parser.add_argument("--items", type=int, default=12, help="prompts of each tiny fine-tune")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="exact", help="of deltas")
    parser.add_argument("--trial", action="store_true", help="small shapes, to try the benchmark")
    parser.add_argument("--part", choices=("all", "tokens"), default="all")
    parser.add_argument("--skip-tokens", action="store_true", help="compare no tokens")
    parser.add_argument("--limit", type=float, default=900, help="seconds for everything")
    parser.add_argument(
        "--warm-limit", type=float, default=HELPERS_LIMIT_S, help="of them, to compare tokens"
    )
    parser.add_argument("--only", nargs="*", help="parts of the large model to measure")
    parser.add_argument("--same-vocabulary", action="store_true", help="leave vocabularies alone")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.backends.cuda.matmul.allow_tf32 = False
    report = Report(args.out, args.device, args.limit)
    report.record["precision"] = args.precision
    end_after(args.limit + GRACE_S)
    with tempfile.TemporaryDirectory() as scratch:
        if args.part == "tokens":
            measure_tokens(args, report, args.made or Path(scratch))
        else:
            measure_large(args, report, Path(scratch))


if __name__ == "__main__":
    main()
