"""Measure which shape of program is fastest: `python -m kernels.tune --out TABLE`.

Compiles all candidates in parallel first, then times them alone, on the sites of a Llama-2-7B; the
table is read by `kernels.tuning`. Nothing is tuned while a model is served.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch

from deltacome_core.layout import RankBand
from kernels import serving
from kernels.arena import ArenaSpec, DeltaArena
from kernels.bench.compiling import count_cpus
from kernels.bench.models import HUB, LLAMA_7B, Pool
from kernels.bench.sections import draw_zipf, fill_slots
from kernels.bench.timing import time_graph
from kernels.image import Site, build_image
from kernels.plan import StepPlan
from kernels.triton_ops.launch_batch import launch_expand, launch_prepare, launch_shrink
from kernels.tuning import Shape, Stage


def _shape(
    blocks: int,
    along_steps: int,
    along_rows: int,
    ahead: int,
    *,
    x: bool = False,
    turns: int = 1,
    tokens: int = 1,
    side: bool = False,
    first: int = 0,
    registers: int = 0,
) -> Shape:
    return Shape(
        blocks=blocks,
        along_steps=along_steps,
        along_rows=along_rows,
        ahead=ahead,
        inputs_ahead=x,
        turns=turns,
        tokens=tokens,
        tokens_first=side,
        streams_first=first,
        registers=registers,
    )


# A program of `shrink` has a multiple of 32 rows.
CANDIDATES: Final[dict[Stage, tuple[Shape, ...]]] = {
    "shrink": (
        _shape(2, 16, 1, 1),
        _shape(2, 8, 1, 2, x=True),
        _shape(2, 8, 1, 4, x=True, registers=128),
        _shape(2, 4, 1, 2, x=True, registers=80),
        _shape(2, 4, 1, 2, x=True, side=True, registers=80),
        _shape(2, 4, 1, 4, x=True, registers=160),
        _shape(2, 4, 1, 4, x=True, turns=4, registers=160),
        *(
            _shape(2, 4, 1, 4, x=True, turns=turns, side=side, registers=128)
            for turns in (1, 2, 4)
            for side in (False, True)
        ),
        # Warps along rows, so that tokens of a tenant can share them.
        _shape(2, 2, 2, 4, x=True, tokens=2, side=True, registers=128),
        _shape(2, 1, 4, 4, x=True, tokens=4, side=True, registers=128),
    ),
    "expand": (
        _shape(1, 4, 1, 2, x=True),
        _shape(2, 2, 2, 2, x=True),
        _shape(2, 2, 2, 4, x=True, registers=128),
        _shape(2, 1, 4, 2, x=True, registers=80),
        _shape(2, 1, 4, 3, x=True, registers=112),
        _shape(2, 1, 4, 4, x=True, registers=128),
        *(
            _shape(2, 1, 4, ahead, x=True, turns=turns, side=side, registers=registers)
            for ahead, registers in ((3, 112), (4, 128))
            for turns in (2, 4, 8)
            for side in (False, True)
        ),
        *(
            _shape(2, 1, 4, ahead, x=True, turns=4, tokens=4, side=True, registers=registers)
            for ahead, registers in ((3, 112), (4, 128))
        ),
    ),
    "layer": tuple(
        replace(shape, shrinks=shrinks)
        for shrinks in (False, True)
        for shape in (
            _shape(2, 2, 2, 2, first=132),
            _shape(2, 2, 2, 4, x=True, first=132, registers=128),
            _shape(2, 2, 2, 2, first=264),
            _shape(2, 2, 2, 4, x=True, first=264, registers=128),
            _shape(2, 2, 2, 2, first=528),
            _shape(2, 2, 2, 2, x=True, first=528),
            _shape(1, 4, 1, 2, first=264),
            replace(_shape(2, 2, 2, 2, first=264), stream_columns=512, stream_stages=3),
        )
    ),
}
TOKENS: Final = (1, 8, 32, 64)
# From so many on, tenants of a batch are drawn by Zipf's law: each has several tokens.
_SHARED: Final = 64
# What a choice is found by.
KEY: Final = ("stage", "tokens", "steps", "rows")
_N_SLOTS: Final = 160
# Whole programs of every shape.
_TINY_OUT: Final = 128
# Weights that a launch reads in turn, so that none is found in the cache.
_ROTATED_BYTES: Final = 256 << 20


def build_tiny() -> DeltaArena:
    """The smallest arena whose kernels are those of a real one of the default recipe."""
    site = Site(name="tiny", parts=("a",), out_features=(_TINY_OUT,), in_features=256)
    bands = tuple(RankBand(band.bits, 16) for band in HUB.wide)
    tiny = replace(HUB, square=bands, wide=bands, deep=bands)
    image = build_image((site,), Pool(0).delta((site,), tiny))
    arena = DeltaArena(ArenaSpec.covering((site,), [image]), n_slots=1, device="cuda")
    arena.load(image)
    return arena


def compile_shape(arena: DeltaArena, stage: Stage, shape: Shape) -> None:
    """Compile one kernel by running it on a tiny arena.

    Args:
        arena: of `build_tiny`.
        stage: which kernel.
        shape: its shape.
    """
    plan = StepPlan(arena, n_tokens=1)
    plan.assign([0])
    x = torch.randn(1, 256, device="cuda").bfloat16()
    if stage == "layer":
        weight = torch.randn(_TINY_OUT, 256, device="cuda").bfloat16()
        serving.multiply_layer(x, weight, None, plan, 0, shape)
        return
    launch_prepare(x, plan, 0)
    if stage == "shrink":
        launch_shrink(plan, 0, shape)
    else:
        # Terms are fp32, whatever the model is; outputs are bf16, and wait for its product.
        terms = torch.zeros(1, _TINY_OUT, device="cuda")
        launch_expand(terms, plan, 0, shape, overlap=True)
        launch_expand(terms.bfloat16(), plan, 0, shape)


def count_workers(stages: Sequence[Stage]) -> int:
    """Processes that compile: each holds a context on the device, so none has nothing to do.

    Args:
        stages: whose candidates.
    """
    return min(count_cpus(), sum(len(CANDIDATES[stage]) for stage in stages))


def compile_share(worker: int, stages: Sequence[Stage]) -> None:
    """Compile a share of the candidates.

    Args:
        worker: which share, of `count_workers`.
        stages: whose candidates.
    """
    arena = build_tiny()
    jobs = [(stage, shape) for stage in stages for shape in CANDIDATES[stage]]
    for stage, shape in jobs[worker :: count_workers(stages)]:
        compile_shape(arena, stage, shape)
    torch.cuda.synchronize()


def precompile(stages: Sequence[Stage]) -> None:
    """Compile all candidates in parallel processes, into the cache on disk.

    Args:
        stages: whose candidates.

    Raises:
        RuntimeError: a candidate does not compile.
    """
    command = [sys.executable, "-m", "kernels.tune", "--stages", *stages, "--worker"]
    workers = [subprocess.Popen([*command, str(number)]) for number in range(count_workers(stages))]
    if any(worker.wait() for worker in workers):
        raise RuntimeError("a worker could not compile its candidates")


def _draw_weights(site: Site) -> list[torch.Tensor]:
    size = site.total_out * site.in_features * 2
    return [
        torch.randn(site.total_out, site.in_features, device="cuda").bfloat16()
        for _ in range(-(-_ROTATED_BYTES // size))
    ]


def _runs(
    arena: DeltaArena, site: int, plans: Sequence[StepPlan], stages: Sequence[Stage]
) -> Iterator[tuple[Stage, Shape, Callable[[], None]]]:
    """Each candidate and a run of it over all plans."""
    where = arena.spec.sites[site]
    n_tokens = plans[0].n_tokens
    x = torch.randn(n_tokens, where.in_features, device="cuda").bfloat16()
    y = torch.randn(n_tokens, where.total_out, device="cuda")
    weights = _draw_weights(where) if "layer" in stages else []
    for plan in plans:
        launch_prepare(x, plan, site)

    def launch(stage: Stage, shape: Shape) -> None:
        for number, plan in enumerate(plans):
            if stage == "layer":
                weight = weights[number % len(weights)]
                serving.multiply_layer(x, weight, None, plan, site, shape)
            elif stage == "shrink":
                launch_shrink(plan, site, shape)
            else:
                launch_expand(y, plan, site, shape, overlap=True)

    for stage in stages:
        for shape in CANDIDATES[stage]:
            fits = all(out % shape.rows == 0 for out in where.out_features)
            is_layer = stage == "layer"
            is_shared = n_tokens >= _SHARED
            if (fits and n_tokens == 1) if is_layer else (is_shared or shape.tokens == 1):
                yield stage, shape, partial(launch, stage, shape)


def _time_shapes(
    arena: DeltaArena, site: int, n_tokens: int, stages: Sequence[Stage]
) -> list[dict[str, Any]]:
    """Each candidate on rotating tenants, so that no codes are found in the cache."""
    plans = []
    for first in range(arena.n_slots // n_tokens if n_tokens > 1 else 48):
        plan = StepPlan(arena, n_tokens=n_tokens)
        slots = range(n_tokens) if n_tokens < _SHARED else draw_zipf(n_tokens, n_tokens, seed=0)
        plan.assign([(first * n_tokens + slot) % arena.n_slots for slot in slots])
        plans.append(plan)
    found = []
    for stage, shape, run in _runs(arena, site, plans, stages):
        steps, rows = serving.measure_stage(stage, arena.spec, site)
        found.append(
            {
                "stage": stage,
                "tokens": n_tokens,
                "steps": steps,
                "rows": rows,
                "site": arena.spec.sites[site].name.rpartition(".")[2],
                "shape": asdict(shape),
                "us": time_graph(run, n_calls=5) / len(plans),
            }
        )
    return found


def choose(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest shape for each stage, number of tokens, length and number of rows.

    Args:
        rows: of the timings.

    Returns:
        One row each, times of sites with equal sizes added up.
    """
    sums: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        key = tuple(row[name] for name in KEY)
        shape = json.dumps(row["shape"])
        sums.setdefault(key, {}).setdefault(shape, 0.0)
        sums[key][shape] += row["us"]
    chosen = []
    for key, times in sums.items():
        best = min(times, key=lambda shape: times[shape])
        named = dict(zip(KEY, key, strict=True))
        chosen.append(named | {"shape": json.loads(best), "us": times[best]})
    return chosen


def sweep(stages: Sequence[Stage], token_counts: Sequence[int]) -> list[dict[str, Any]]:
    """Time candidates on the sites of one layer of a Llama-2-7B.

    Args:
        stages: whose candidates.
        token_counts: tokens of a launch, each of another tenant if there are few.

    Returns:
        One row a candidate, site and number of tokens.
    """
    sites = LLAMA_7B.sites()[:4]
    image = build_image(sites, Pool(0).delta(sites, HUB), pin=True)
    arena = DeltaArena(ArenaSpec.covering(sites, [image]), n_slots=_N_SLOTS, device="cuda")
    fill_slots(arena, image)
    rows = []
    for site, n_tokens in product(range(len(sites)), token_counts):
        rows += _time_shapes(arena, site, n_tokens, stages)
    return rows


def merge_tables(table: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Put new timings in the place of those of the same stages and numbers of tokens.

    Args:
        table: what was written before, may be empty.
        rows: of the timings.

    Returns:
        The table with choices made of what was measured last.
    """
    new = {(row["stage"], row["tokens"]) for row in rows}

    def keep(old: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row for row in old if (row["stage"], row["tokens"]) not in new]

    return {
        "device": torch.cuda.get_device_name(),
        "choices": keep(table.get("choices", [])) + choose(rows),
        "measured": keep(table.get("measured", [])) + rows,
    }


def main() -> int:
    """Write the table of this device's architecture."""
    parser = argparse.ArgumentParser(prog="python -m kernels.tune")
    parser.add_argument("--out", type=Path, metavar="TABLE")
    parser.add_argument("--update", type=Path, help="a table whose other launches are kept")
    parser.add_argument("--stages", nargs="+", choices=tuple(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("No CUDA device is available: nothing was measured.\n")
        return 1
    if arguments.worker is not None:
        compile_share(arguments.worker, arguments.stages)
        return 0
    precompile(arguments.stages)
    old = {} if arguments.update is None else json.loads(arguments.update.read_text())
    table = merge_tables(old, sweep(arguments.stages, arguments.tokens))
    text = json.dumps(table, indent=1) + "\n"
    if arguments.out is None:
        sys.stdout.write(text)
    else:
        arguments.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
