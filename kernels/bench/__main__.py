"""`python -m kernels.bench --json OUT`: correctness first, then times, then the bars."""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch

from kernels.bench import baselines, checks, compiling, correctness, sections, timing
from kernels.bench.bars import judge
from kernels.bench.models import COME, HUB, LLAMA_7B
from kernels.fragments import PLANES, PRECISIONS
from kernels.gpu_check import describe_device
from kernels.wanted import ArenaKernels

_N_SLOTS: Final = 64
_ZIPF_TOKENS: Final = 64
_TENANTS: Final = (1, 8, 32)
_MODES: Final = tuple(PRECISIONS.values())
# A case whose kernels are compiled takes no longer.
_CASE_S: Final = 60.0
SECTIONS: Final = (
    "correctness",
    "checks",
    "ceilings",
    "decode",
    "zipf",
    "loading",
    "memory",
    "prefill",
    "merge",
    "decode_come",
    "baselines",
    "compiled",
)
# 32,000 x 4,096 embeddings and head at four bits with a scale and zero point a group of 128.
_EMBEDDING_BYTES: Final = 2 * 32000 * 4096 * (4 + 24 / 128) / 8


class Run:
    """Sections of one run; what fails is recorded and does not stop the others."""

    def __init__(self, out: Path | None) -> None:
        self.results: dict[str, Any] = {}
        self.failures: dict[str, str] = {}
        self._out = out
        self._started = time.monotonic()

    def section(self, name: str, measure: Callable[[], Any]) -> None:
        """Run one section and write the report as it stands."""
        try:
            self.results[name] = measure()
        except Exception:  # noqa: BLE001 one broken section must not hide the others
            self.failures[name] = traceback.format_exc(limit=4)
        seconds = round(time.monotonic() - self._started, 1)
        shown = self.failures.get(name) or json.dumps(self.results.get(name))[:1500]
        sys.stdout.write(f"[{seconds}] {name}: {shown}\n")
        sys.stdout.flush()
        self.write()

    def report(self) -> dict[str, Any]:
        """The object that is written."""
        return {
            **describe_device(),
            "commit": os.environ.get("BENCH_COMMIT", ""),
            "method": "CUDA graphs, medians, distinct slabs beyond the cache; see kernels/bench",
            "ceilings": self.results.get("ceilings"),
            "rows": self.results,
            "failures": self.failures,
            "bars": judge(self.results),
        }

    def write(self) -> None:
        """Write the report."""
        if self._out is not None:
            self._out.write_text(json.dumps(self.report(), indent=1) + "\n")


def _ask_process(arguments: Sequence[str], limit_s: float) -> str:
    """The last line that a process of this module writes; empty where it writes none."""
    command = [sys.executable, "-m", "kernels.bench", *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, timeout=max(1.0, limit_s), check=False
    )
    return done.stdout.splitlines()[-1] if done.stdout else ""


def check_correctness(limit_s: float) -> list[dict[str, Any]]:
    """All cases, each in a process of its own, once what they launch is compiled.

    Args:
        limit_s: most seconds that compiling may take.

    Returns:
        One row a case.
    """
    cases = list(correctness.list_cases())
    compiling.compile_within([compiling.want_case(case) for case in cases], limit_s)

    def check(numbered: tuple[int, correctness.BatchCase]) -> dict[str, Any]:
        number, case = numbered
        row: dict[str, Any] = {"case": str(case), "passed": False}
        try:
            row = json.loads(_ask_process(["--case", str(number)], _CASE_S))
        except subprocess.TimeoutExpired:
            row["exception"] = "not compiled in time"
        except ValueError:
            row["exception"] = "ended without a result"
        return row

    with ThreadPoolExecutor(compiling.count_cpus()) as pool:
        return list(pool.map(check, enumerate(cases)))


def _decode(bench: sections.Bench) -> list[dict[str, Any]]:
    return [
        sections.time_decode(bench, list(range(n)), planes=planes)
        for n in _TENANTS
        for planes in _MODES
    ]


def _memory(bench: sections.Bench) -> dict[str, Any]:
    return sections.count_resident(bench, embedding_bytes=int(_EMBEDDING_BYTES))


def _decode_come(benches: list[sections.Bench]) -> list[dict[str, Any]]:
    weights = benches[0].weights if benches else None
    benches.clear()
    torch.cuda.empty_cache()
    bench = sections.build_bench(LLAMA_7B, COME, n_slots=32, weights=weights)
    return [sections.time_decode(bench, list(range(n)), planes=PLANES) for n in _TENANTS]


def _baselines(benches: list[sections.Bench]) -> dict[str, float]:
    benches.clear()
    torch.cuda.empty_cache()
    return {
        **baselines.time_eager(HUB),
        "bmm_us": baselines.time_bmm(HUB, n_tenants=32),
        "binary_us": baselines.time_binary(n_tenants=32),
    }


def _zipf(bench: sections.Bench) -> list[dict[str, Any]]:
    slots = sections.draw_zipf(_ZIPF_TOKENS, _N_SLOTS, seed=0)
    return [sections.time_decode(bench, slots, planes=planes) for planes in _MODES]


def list_wanted(names: frozenset[str]) -> list[ArenaKernels]:
    """What steps of the chosen sections launch.

    Args:
        names: of SECTIONS.

    Returns:
        The kernels, by recipe.
    """
    wanted = []
    if names & {"decode", "zipf"}:
        sizes = (*_TENANTS, _ZIPF_TOKENS)
        wanted.append(compiling.want_steps(LLAMA_7B, HUB, sizes, all_planes=_MODES))
    if "decode_come" in names:
        wanted.append(compiling.want_steps(LLAMA_7B, COME, _TENANTS, all_planes=(PLANES,)))
    return wanted


def start_workers(names: frozenset[str]) -> list[subprocess.Popen[Any]]:
    """Processes that compile what the sections will run."""
    workers: list[subprocess.Popen[Any]] = []
    if "compiled" in names:
        command = [sys.executable, "-m", "kernels.bench", "--compile-baseline"]
        workers.append(subprocess.Popen(command))
    wanted = list_wanted(names)
    if wanted:
        workers.append(compiling.start_compiler(wanted))
    return workers


def run_all(run: Run, names: frozenset[str], *, correctness_s: float) -> None:
    """The chosen sections in order.

    Args:
        run: where results go.
        names: of SECTIONS.
        correctness_s: most seconds that compiling the cases may take.
    """
    if "correctness" in names:
        run.section("correctness", lambda: check_correctness(correctness_s))
    # Only now: the cases need all CPUs to be compiled in time.
    workers = start_workers(names)
    benches: list[sections.Bench] = []

    def on_model(measure: Callable[[sections.Bench], Any]) -> Any:
        if not benches:
            benches.append(sections.build_bench(LLAMA_7B, HUB, n_slots=_N_SLOTS))
        return measure(benches[0])

    measures: dict[str, Callable[[], Any]] = {
        "checks": lambda: [*checks.check_vocabulary("cuda"), *checks.check_dense("cuda")],
        "ceilings": timing.measure_ceilings,
        "decode": lambda: on_model(_decode),
        "zipf": lambda: on_model(_zipf),
        "loading": lambda: on_model(sections.time_loading),
        "memory": lambda: on_model(_memory),
        "prefill": lambda: on_model(lambda bench: sections.time_prefill(bench, n_tokens=2048)),
        "merge": lambda: on_model(sections.time_merge),
        "decode_come": lambda: _decode_come(benches),
        "baselines": lambda: _baselines(benches),
        "compiled": lambda: baselines.time_compiled(HUB),
    }
    for name in (name for name in measures if name in names):
        if name != "checks":
            # Nothing else may run while times are taken.
            for worker in workers:
                worker.wait()
        run.section(name, measures[name])


def main() -> int:
    """Run the benchmark; 0 if all cases are correct and no section failed."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report to this file")
    parser.add_argument("--correctness-seconds", type=float, default=300.0)
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--update", type=Path, help="a report whose other sections are kept")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--compile-baseline", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("No CUDA device is available: nothing was measured.\n")
        return 1
    names = frozenset(arguments.sections)
    if arguments.case is not None:
        case = list(correctness.list_cases())[arguments.case]
        sys.stdout.write(json.dumps(correctness.run_case(case, "cuda")) + "\n")
        return 0
    if arguments.compile_baseline:
        baselines.time_compiled(HUB)
        return 0
    run = Run(arguments.json)
    if arguments.update is not None:
        run.results = json.loads(arguments.update.read_text())["rows"]
    run_all(run, names, correctness_s=arguments.correctness_seconds)
    for bar in judge(run.results):
        sys.stdout.write(json.dumps(bar) + "\n")
    cases = [*run.results.get("correctness", []), *run.results.get("checks", [])]
    return 0 if cases and all(row["passed"] for row in cases) and not run.failures else 1


if __name__ == "__main__":
    sys.exit(main())
