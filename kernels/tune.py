"""Measure which shape of program is fastest: `python -m kernels.tune --out TABLE`.

Compiles all candidates in parallel first, then times them alone, on the sites of a Llama-2-7B; the
table is read by `kernels.tuning`. Nothing is tuned while a model is served.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch

from deltacome_core.layout import RankBand
from kernels import serving
from kernels.arena import ArenaSpec, DeltaArena
from kernels.bench.models import HUB, LLAMA_7B, Layout, Pool
from kernels.bench.sections import fill_slots
from kernels.bench.timing import time_graph
from kernels.image import Site, build_image
from kernels.plan import StepPlan
from kernels.triton_ops.launch_batch import launch_expand, launch_prepare, launch_shrink
from kernels.tuning import Shape, Stage


def _shape(blocks: int, along_steps: int, along_rows: int, ahead: int) -> Shape:
    return Shape(blocks=blocks, along_steps=along_steps, along_rows=along_rows, ahead=ahead)


# Those of sixteen that were within a tenth of the best in a first sweep, and their neighbours.
CANDIDATES: Final[dict[Stage, tuple[Shape, ...]]] = {
    "shrink": (
        _shape(1, 8, 1, 4),
        _shape(1, 16, 1, 2),
        _shape(2, 8, 1, 2),
        _shape(2, 4, 1, 4),
        _shape(2, 4, 1, 2),
        _shape(2, 2, 1, 4),
        _shape(2, 2, 2, 2),
        _shape(4, 4, 1, 2),
        _shape(4, 2, 1, 2),
        _shape(2, 4, 1, 1),
        _shape(1, 4, 1, 4),
    ),
    "expand": (
        _shape(1, 4, 1, 2),
        _shape(1, 2, 2, 2),
        _shape(1, 2, 2, 4),
        _shape(2, 2, 2, 2),
        _shape(2, 1, 4, 2),
        _shape(2, 1, 2, 4),
        _shape(4, 1, 2, 2),
        _shape(4, 2, 2, 2),
        _shape(2, 1, 2, 2),
        _shape(4, 1, 1, 2),
        _shape(4, 1, 2, 4),
        _shape(2, 1, 1, 4),
        _shape(1, 8, 1, 2),
    ),
}
GROUPS: Final = (1, 8, 32)
_N_SLOTS: Final = 160
_WORKERS: Final = 15


def build_tiny(layout: Layout) -> DeltaArena:
    """The smallest arena whose kernels are those of a real one of the same recipe."""
    site = Site(name="tiny", parts=("a",), out_features=(64,), in_features=256)
    bands = tuple(RankBand(band.bits, 16) for band in layout.wide)
    tiny = replace(layout, square=bands, wide=bands, deep=bands)
    image = build_image((site,), Pool(0).delta((site,), tiny))
    arena = DeltaArena(ArenaSpec.covering((site,), [image]), n_slots=1, device="cuda")
    arena.load(image)
    return arena


def compile_shape(
    arena: DeltaArena, stage: Stage, shape: Shape, *, planes: int, units: int
) -> None:
    """Compile one kernel by running it on a tiny arena.

    Args:
        arena: of `build_tiny`.
        stage: which kernel.
        shape: its shape.
        planes: of the activations.
        units: of two tokens a group.
    """
    plan = StepPlan(arena, n_tokens=1, planes=planes, units_per_group=units)
    plan.assign([0])
    launch_prepare(torch.randn(1, 256, device="cuda").bfloat16(), plan, 0)
    if stage == "shrink":
        launch_shrink(plan, 0, shape)
    else:
        # Terms are fp32, whatever the model is; outputs are bf16, and wait for its product.
        terms = torch.zeros(1, 64, device="cuda")
        launch_expand(terms, plan, 0, shape, overlap=True)
        launch_expand(terms.bfloat16(), plan, 0, shape)


def compile_layer(arena: DeltaArena, *, planes: int) -> None:
    """Compile the layer of a lone token by running it on a tiny arena.

    Args:
        arena: of `build_tiny`.
        planes: of the activations.
    """
    plan = StepPlan(arena, n_tokens=1, planes=planes)
    plan.assign([0])
    x, weight = (torch.randn(n, 256, device="cuda").bfloat16() for n in (1, 64))
    serving.delta_linear(x, weight, arena, 0, plan)


def compile_share(worker: int) -> None:
    """Compile every `_WORKERS`-th candidate.

    Args:
        worker: which share.
    """
    arena = build_tiny(HUB)
    jobs = [(stage, shape) for stage, shapes in CANDIDATES.items() for shape in shapes]
    for stage, shape in jobs[worker::_WORKERS]:
        compile_shape(arena, stage, shape, planes=4, units=1)
    torch.cuda.synchronize()


def precompile() -> None:
    """Compile all candidates in parallel processes, into the cache on disk."""
    command = [sys.executable, "-m", "kernels.tune", "--worker"]
    workers = [subprocess.Popen([*command, str(number)]) for number in range(_WORKERS)]
    if any(worker.wait() for worker in workers):
        raise RuntimeError("a worker could not compile its candidates")


def _time_shapes(arena: DeltaArena, site: int, n_groups: int) -> list[dict[str, Any]]:
    """Each candidate on rotating tenants, so that no codes are found in the cache."""
    where = arena.spec.sites[site]
    plans = []
    for first in range(arena.n_slots // n_groups if n_groups > 1 else 48):
        plan = StepPlan(arena, n_tokens=n_groups)
        plan.assign([(first * n_groups + i) % arena.n_slots for i in range(n_groups)])
        plans.append(plan)
    x = torch.randn(n_groups, where.in_features, device="cuda").bfloat16()
    y = torch.randn(n_groups, where.total_out, device="cuda")
    for plan in plans:
        launch_prepare(x, plan, site)
    rows = []
    for stage, shapes in CANDIDATES.items():
        for shape in shapes:

            def run(stage: Stage = stage, shape: Shape = shape) -> None:
                for plan in plans:
                    if stage == "shrink":
                        launch_shrink(plan, site, shape)
                    else:
                        launch_expand(y, plan, site, shape, overlap=True)

            steps = where.input_steps if stage == "shrink" else arena.spec.hidden_steps(site)
            rows.append(
                {
                    "stage": stage,
                    "groups": n_groups,
                    "steps": steps,
                    "site": where.name.rpartition(".")[2],
                    "shape": asdict(shape),
                    "us": time_graph(run, n_calls=5) / len(plans),
                }
            )
    return rows


def choose(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest shape for each stage, number of groups and length of rows.

    Args:
        rows: of the timings.

    Returns:
        One row each, times of sites with equal lengths added up.
    """
    sums: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        key = (row["stage"], row["groups"], row["steps"])
        shape = json.dumps(row["shape"])
        sums.setdefault(key, {}).setdefault(shape, 0.0)
        sums[key][shape] += row["us"]
    chosen = []
    for (stage, groups, steps), times in sums.items():
        best = min(times, key=lambda shape: times[shape])
        chosen.append(
            {
                "stage": stage,
                "groups": groups,
                "steps": steps,
                "shape": json.loads(best),
                "us": times[best],
            }
        )
    return chosen


def sweep() -> list[dict[str, Any]]:
    """Time all candidates on the sites of one layer of a Llama-2-7B."""
    sites = LLAMA_7B.sites()[:4]
    image = build_image(sites, Pool(0).delta(sites, HUB), pin=True)
    arena = DeltaArena(ArenaSpec.covering(sites, [image]), n_slots=_N_SLOTS, device="cuda")
    fill_slots(arena, image)
    rows = []
    for site, n_groups in product(range(len(sites)), GROUPS):
        rows += _time_shapes(arena, site, n_groups)
    return rows


def main() -> int:
    """Write the table of this device's architecture."""
    parser = argparse.ArgumentParser(prog="python -m kernels.tune")
    parser.add_argument("--out", type=Path, metavar="TABLE")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("No CUDA device is available: nothing was measured.\n")
        return 1
    if arguments.worker is not None:
        compile_share(arguments.worker)
        return 0
    precompile()
    rows = sweep()
    table = {"device": torch.cuda.get_device_name(), "choices": choose(rows), "measured": rows}
    text = json.dumps(table, indent=1) + "\n"
    if arguments.out is None:
        sys.stdout.write(text)
    else:
        arguments.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
