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
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch

from kernels.bench import baselines, checks, correctness, products, sections, timing
from kernels.bench.bars import judge
from kernels.bench.models import COME, HUB, LAYOUTS, LLAMA_7B, Layout
from kernels.fragments import FAST_PLANES, PLANES
from kernels.gpu_check import describe_device
from kernels.triton_ops.launch_batch import current_arch
from kernels.tune import build_tiny, compile_shape
from kernels.tuning import Shape, Stage, choose_shape, load_table

_N_SLOTS: Final = 64
_ZIPF_TOKENS: Final = 64
_WORKERS: Final = 12
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


def list_kernels(names: frozenset[str]) -> list[tuple[Layout, Stage, Shape, int]]:
    """Triton kernels of some sections: layout, stage, shape and planes, the slowest first.

    Args:
        names: of the sections.

    Returns:
        What they launch.
    """
    wanted: set[tuple[str, Stage, Shape, int]] = set()
    for choice in load_table(current_arch()):
        stage, shape = choice.stage, choice.shape
        if names & {"decode", "zipf"}:
            wanted |= {(HUB.name, stage, shape, planes) for planes in (PLANES, FAST_PLANES)}
        if "decode_come" in names:
            wanted.add((COME.name, stage, shape, PLANES))
    layer = choose_shape("layer", groups=1, steps=1, rows=1, arch=current_arch())
    if "decode" in names:
        wanted |= {(HUB.name, "layer", layer, planes) for planes in (PLANES, FAST_PLANES)}
    if "decode_come" in names:
        wanted.add((COME.name, "layer", layer, PLANES))
    ordered = sorted(wanted, key=lambda one: (one[0] == HUB.name, one[1] == "shrink", str(one)))
    return [(LAYOUTS[name], stage, shape, planes) for name, stage, shape, planes in ordered]


def warm(worker: int, names: frozenset[str]) -> None:
    """Compile every `_WORKERS`-th kernel of the sections into the cache on disk."""
    arenas: dict[str, Any] = {}
    for layout, stage, shape, planes in list_kernels(names)[worker::_WORKERS]:
        if layout.name not in arenas:
            arenas[layout.name] = build_tiny(layout)
        compile_shape(arenas[layout.name], stage, shape, planes=planes, units=1)
    torch.cuda.synchronize()


def _ask_process(arguments: Sequence[str], limit_s: float) -> str:
    """The last line that a process of this module writes; empty where it writes none."""
    command = [sys.executable, "-m", "kernels.bench", *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, timeout=max(1.0, limit_s), check=False
    )
    return done.stdout.splitlines()[-1] if done.stdout else ""


def list_compilations() -> list[tuple[int, int]]:
    """Each product of the correctness cases once, the slowest to compile first.

    Returns:
        Numbers of a case that launches it, and of the product among those of the case.
    """
    first: dict[products.Product, tuple[int, int]] = {}
    for case_number, case in enumerate(correctness.list_cases()):
        plan = products.plan_case(case, "cpu")
        for number, product in enumerate(products.list_products(plan, 0)):
            first.setdefault(product, (case_number, number))
    return [first[product] for product in sorted(first, key=lambda one: -one.cost)]


def _count_cpus() -> int:
    # Those this process may use; a machine may have more.
    return len(os.sched_getaffinity(0))


def _compile_products(deadline: float) -> None:
    """Compile what the cases launch, as many products at a time as there are CPUs.

    What fails here or is late is missing from the cache: its case then compiles it, and says so.
    """

    def compile_one(numbers: tuple[int, int]) -> None:
        case, product = map(str, numbers)
        left = deadline - time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            _ask_process(["--case", case, "--product", product], left)

    with ThreadPoolExecutor(_count_cpus()) as pool:
        list(pool.map(compile_one, list_compilations()))


def check_correctness(limit_s: float) -> list[dict[str, Any]]:
    """All cases, each in a process of its own, once what they launch is compiled.

    Args:
        limit_s: most seconds that compiling may take.

    Returns:
        One row a case.
    """
    _compile_products(time.monotonic() + limit_s)

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

    with ThreadPoolExecutor(_count_cpus()) as pool:
        return list(pool.map(check, enumerate(correctness.list_cases())))


def _decode(bench: sections.Bench) -> list[dict[str, Any]]:
    return [
        sections.time_decode(bench, list(range(n)), planes=planes)
        for n in (1, 8, 32)
        for planes in (4, 2)
    ]


def _memory(bench: sections.Bench) -> dict[str, Any]:
    return sections.count_resident(bench, embedding_bytes=int(_EMBEDDING_BYTES))


def _decode_come(benches: list[sections.Bench]) -> list[dict[str, Any]]:
    weights = benches[0].weights if benches else None
    benches.clear()
    torch.cuda.empty_cache()
    bench = sections.build_bench(LLAMA_7B, COME, n_slots=32, weights=weights)
    return [sections.time_decode(bench, list(range(n)), planes=4) for n in (1, 8, 32)]


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
    return [sections.time_decode(bench, slots, planes=planes) for planes in (PLANES, FAST_PLANES)]


def start_workers(names: frozenset[str]) -> list[subprocess.Popen[bytes]]:
    """Processes that compile what the sections will run."""
    command = [sys.executable, "-m", "kernels.bench"]
    workers = []
    if "compiled" in names:
        workers.append(subprocess.Popen([*command, "--compile-baseline"]))
    if names & {"decode", "zipf", "decode_come"}:
        chosen = ["--sections", *sorted(names)]
        workers += [
            subprocess.Popen([*command, "--warm", str(number), *chosen])
            for number in range(_WORKERS)
        ]
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
    parser.add_argument("--product", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--compile-baseline", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("No CUDA device is available: nothing was measured.\n")
        return 1
    names = frozenset(arguments.sections)
    if arguments.case is not None:
        case = list(correctness.list_cases())[arguments.case]
        if arguments.product is not None:
            plan = products.plan_case(case, "cuda")
            product = list(products.list_products(plan, 0))[arguments.product]
            products.compile_product(product, plan, 0)
            return 0
        sys.stdout.write(json.dumps(correctness.run_case(case, "cuda")) + "\n")
        return 0
    if arguments.warm is not None:
        warm(arguments.warm, names)
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
