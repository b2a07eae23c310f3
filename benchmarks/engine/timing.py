"""Times of device work; without a GPU the same work by the clock, to try the benchmark itself."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
import triton

from kernels.bench import timing


class _Again:
    def __init__(self, work: Callable[[], object]) -> None:
        self.replay = work


def capture(work: Callable[[], object], device: str) -> Any:
    return timing.capture(work) if device == "cuda" else _Again(work)


def time_ms(work: Callable[[], object], device: str, *, n_calls: int = 15) -> float:
    """Median milliseconds of work that is queued on the current stream."""
    if device == "cuda":
        return timing.time_calls(work, n_calls=n_calls) / 1e3
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def describe_machine(device: str) -> dict[str, Any]:
    """Device and versions, as they stand beside figures."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "triton": triton.__version__,
        },
    }


def used_bytes(device: str) -> int:
    """What the device has given away, contexts and graphs included."""
    if device != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free
