"""What the benchmark launches, compiled side by side before anything waits for it."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Final

from kernels.arena import ArenaSpec
from kernels.bench.correctness import BatchCase, cover_case
from kernels.bench.models import Layout, ModelShape, Pool
from kernels.image import build_image
from kernels.triton_ops.launch_batch import current_arch
from kernels.wanted import ArenaKernels, Room, dump_request

# Terms by themselves are summed in fp32, whatever the model is.
_TERMS: Final = "float32"
_OUTPUTS: Final = "bfloat16"
# Layers of a model are alike: the sites of one stand for all.
_LAYER_SITES: Final = 4


def _list_rooms(n_sites: int, **sizes: Any) -> tuple[Room, ...]:
    """Terms, and whole layers, for one size of step."""
    common = sizes | {"first_site": 0, "last_site": n_sites, "reads": _OUTPUTS}
    return (
        Room(writes=_TERMS, **common),
        Room(writes=_OUTPUTS, is_whole=True, **common),
    )


def want_case(case: BatchCase) -> ArenaKernels:
    """What a case launches.

    Args:
        case: of the correctness.

    Returns:
        Its kernels, and those of unfolding, which it does not launch.
    """
    rooms = _list_rooms(1, n_tokens=len(case.slots), planes=case.planes)
    return ArenaKernels(spec=cover_case(case), rooms=rooms, dtype=_OUTPUTS)


def want_steps(
    model: ModelShape, layout: Layout, sizes: Sequence[int], *, all_planes: Sequence[int]
) -> ArenaKernels:
    """What steps of a whole model launch.

    Args:
        model: sizes of its layers.
        layout: recipe of the deltas.
        sizes: tokens of each step.
        all_planes: of the activations.

    Returns:
        The kernels.
    """
    sites = model.sites()[:_LAYER_SITES]
    image = build_image(sites, Pool(0).delta(sites, layout))
    rooms = tuple(
        room
        for n_tokens in sizes
        for planes in all_planes
        for room in _list_rooms(len(sites), n_tokens=n_tokens, planes=planes)
    )
    return ArenaKernels(spec=ArenaSpec.covering(sites, [image]), rooms=rooms, dtype=_OUTPUTS)


def count_cpus() -> int:
    """CPUs that this process may use; a machine may have more."""
    return len(os.sched_getaffinity(0))


def start_compiler(wanted: Sequence[ArenaKernels]) -> subprocess.Popen[str]:
    """Compile into the cache on disk, in processes of its own.

    Args:
        wanted: what to compile.

    Returns:
        The first of them; the others end with its session.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "kernels.precompile", "--workers", str(count_cpus())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    if process.stdin is not None:
        process.stdin.write(dump_request(wanted, arch=current_arch()))
        process.stdin.close()
    return process


def compile_within(wanted: Sequence[ArenaKernels], limit_s: float) -> None:
    """Compile until it is done or the time is over: what is missing then, its user compiles.

    Args:
        wanted: what to compile.
        limit_s: most seconds that this may take.
    """
    process = start_compiler(wanted)
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
