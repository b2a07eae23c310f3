"""Compile kernels into Triton's cache before the first launch: `python -m kernels.precompile`.

Reads what `dump_request` wrote from its input and needs no GPU, so it may run beside an engine that
answers. What is launched is found by launching it: the launchers of a step run on
tensors that nobody reads, under a driver that has no device, and every launch is noted and skipped.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any, Final

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from kernels.arena import REPACK_BLOCK, DeltaArena
from kernels.compile_matrix import WARP_SIZE
from kernels.fragments import UNIT_BYTES, WORD_COLUMNS
from kernels.plan import StepPlan
from kernels.serving import add_delta, choose_layer, multiply_beside, multiply_layer
from kernels.triton_ops.launch_batch import launch_repack
from kernels.triton_ops.launch_rows import launch_gather, launch_project
from kernels.triton_ops.unfold import unfold
from kernels.wanted import (
    ArenaKernels,
    Room,
    RowKernels,
    Wanted,
    distinct_sites,
    name_wanted,
    parse_wanted,
)

_DONE: Final = "precompiled"
# Answers of the engine beside this come first.
_NICENESS: Final = 10
_JOB_INTS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One kernel to compile, as its launch specialised it."""

    module: str
    name: str
    specialization: str


class CompilationError(Exception):
    """The compiler refused a kernel; the text names it."""


class _NoDevice:
    """A driver that knows what to compile for and can launch nothing."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, WARP_SIZE)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


@contextmanager
def noting_launches(arch: int) -> Iterator[dict[str, Job]]:
    """Note what is launched instead of launching it.

    For processes that launch nothing themselves: the driver is replaced for good.

    Args:
        arch: compute capability to compile for, 90 for Hopper.

    Yields:
        The kernels, each once, in the order of their first launch.
    """
    driver.set_active(_NoDevice(arch))
    found: dict[str, Job] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:  # noqa: A002  Triton's name
        text = compile["specialization_data"]
        found.setdefault(text, Job(module=fn.module, name=fn.name, specialization=text))
        return True

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = note
        yield found


def list_kernels(wanted: Wanted, *, arch: int) -> list[Job]:
    """List what is to be compiled.

    Args:
        wanted: for what.
        arch: compute capability, 90 for Hopper.

    Returns:
        Each kernel once.
    """
    with noting_launches(arch) as found:
        if isinstance(wanted, RowKernels):
            _launch_rows(wanted)
        else:
            _launch_arena(wanted)
    return list(found.values())


def _launch_rows(wanted: RowKernels) -> None:
    kind = wanted.kind
    rows = torch.empty(1, kind.cols, dtype=getattr(torch, wanted.dtype))
    slots = torch.zeros(1, dtype=torch.int32)
    table = torch.zeros(1, 5, dtype=torch.int64)
    launch_gather(
        rows,
        slots,
        slots,
        table,
        cols=kind.cols,
        width=kind.width,
        bits=kind.bits,
        group=kind.group,
        has_zero=kind.has_zero,
        has_basis=kind.has_basis,
    )
    if kind.has_basis:
        launch_project(rows, slots, table, torch.empty(1, kind.width))


def _launch_arena(wanted: ArenaKernels) -> None:
    spec = wanted.spec
    # No launch depends on the size of a slab, nor on how many there are.
    arena = DeltaArena(
        replace(spec, slab_bytes=UNIT_BYTES), n_slots=1, device="cpu", operand_order=True
    )
    slab = torch.empty(UNIT_BYTES, dtype=torch.uint8)
    jobs = torch.zeros(1, _JOB_INTS, dtype=torch.int64)
    launch_repack(jobs, slab, slab, widths=spec.all_widths, programs=1, block=REPACK_BLOCK)
    for room in wanted.rooms:
        _launch_room(arena, room)
    dtype = getattr(torch, wanted.dtype)
    for site in distinct_sites(spec, range(len(spec.sites))):
        where = spec.sites[site]
        unfold(
            arena.directory[0, site],
            arena.table,
            torch.empty(where.total_out, WORD_COLUMNS, dtype=dtype),
            torch.empty(WORD_COLUMNS, where.in_features, dtype=dtype),
            n_shrink=1,
            n_parts=len(where.parts),
            widths=spec.widths(site),
            has_groups=spec.has_groups(site),
        )


def _launch_room(arena: DeltaArena, room: Room) -> None:
    plan = StepPlan(
        arena,
        n_tokens=room.n_tokens,
        n_places=room.n_places,
        planes=room.planes,
    )
    n_tokens = room.n_tokens or 1
    plan.assign([-1] * n_tokens)
    reads, writes = getattr(torch, room.reads), getattr(torch, room.writes)
    for site in distinct_sites(arena.spec, range(room.first_site, room.last_site)):
        where = arena.spec.sites[site]
        x = torch.empty(n_tokens, where.in_features, dtype=reads)
        y = torch.empty(n_tokens, where.total_out, dtype=writes)
        add_delta(y, x, plan, site)
        if room.is_whole:
            weight = torch.empty(where.total_out, where.in_features, dtype=writes)
            _launch_whole(x, weight, y, plan, site)


def _launch_whole(
    x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, plan: StepPlan, site: int
) -> None:
    shape = choose_layer(weight, plan, site)
    if shape is None:
        multiply_beside(x, plan, site, lambda: y)
    else:
        multiply_layer(x, weight, None, plan, site, shape)


def name_kernels(wanted: Wanted, *, arch: int) -> str:
    """Name what this compiler makes of what is wanted, in its cache.

    Args:
        wanted: what to compile.
        arch: compute capability, 90 for Hopper.

    Returns:
        64 hexadecimal digits.
    """
    return name_wanted(wanted, arch=arch, compiler=triton.__version__)


def is_compiled(wanted: Wanted, *, arch: int) -> bool:
    """Whether the cache holds all that is wanted.

    Args:
        wanted: what to compile.
        arch: compute capability, 90 for Hopper.

    Returns:
        True where a process compiled it into the folder that TRITON_CACHE_DIR names.
    """
    return get_cache_manager(name_kernels(wanted, arch=arch)).get_file(_DONE) is not None


def compile_all(jobs: Sequence[Job], *, workers: int) -> None:
    """Compile kernels side by side into the cache; those that it holds take no time.

    Args:
        jobs: of `list_kernels`, for one architecture.
        workers: processes.

    Raises:
        CompilationError: one does not compile.
    """
    # Forked, they share what this process has imported; it has neither a device nor threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        waiting = [(job, pool.submit(_compile, job)) for job in jobs]
        for job, done in waiting:
            try:
                done.result()
            except Exception as error:
                pool.shutdown(wait=False, cancel_futures=True)
                text = f"{job.name} does not compile ({type(error).__name__})"
                raise CompilationError(text) from error


def _compile(job: Job) -> None:
    getattr(sys.modules[job.module], job.name).preload(job.specialization)


def main() -> int:
    """Compile what the input asks for; 1, and why on the last line, where that fails."""
    parser = argparse.ArgumentParser(prog="python -m kernels.precompile", description=__doc__)
    parser.add_argument("--workers", type=int, default=1, help="processes (%(default)s)")
    workers = parser.parse_args().workers
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    asked = json.load(sys.stdin)
    os.nice(_NICENESS)
    arch = asked["arch"]
    all_wanted = [parse_wanted(text) for text in asked["wanted"]]
    jobs = {job.specialization: job for w in all_wanted for job in list_kernels(w, arch=arch)}
    try:
        compile_all(list(jobs.values()), workers=workers)
    except CompilationError as error:
        sys.stderr.write(f"{error.__cause__}\n{error}\n")
        return 1
    for wanted in all_wanted:
        get_cache_manager(name_kernels(wanted, arch=arch)).put("", _DONE, binary=False)
    sys.stdout.write(f"{len(jobs)} kernels\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
