"""Times of device work, and the ceilings of the device they are compared with."""

import statistics
from collections.abc import Callable
from typing import Final

import torch

_WARM_RUNS: Final = 3
_REPLAYS: Final = 15


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Record work as a CUDA graph.

    Args:
        work: launches on the current stream; may fork to others and must join them.

    Returns:
        The graph, replayed a few times.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(_WARM_RUNS):
        graph.replay()
    torch.cuda.synchronize()
    return graph


def time_calls(call: Callable[[], object], *, n_calls: int = _REPLAYS) -> float:
    """Median time of a call in microseconds, by device events.

    Args:
        call: queues work on the current stream.
        n_calls: how many are timed.

    Returns:
        Microseconds.
    """
    times = []
    for _ in range(n_calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return float(statistics.median(times))


def time_graph(work: Callable[[], object], *, n_calls: int = _REPLAYS) -> float:
    """Median time of work in microseconds, captured once and replayed.

    Args:
        work: of `capture`.
        n_calls: replays that are timed.

    Returns:
        Microseconds.
    """
    graph = capture(work)
    return time_calls(graph.replay, n_calls=n_calls)


def measure_ceilings() -> dict[str, float]:
    """What this device does at best, in this run.

    Returns:
        read_gbps and copy_gbps of device memory, host_gbps from page-locked memory, bf16_tflops of
        a matrix product, launch_us of an empty kernel in a graph.
    """
    data = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").view(torch.int32)
    data.random_()
    read_us = min(time_calls(lambda: torch.amax(data)) for _ in range(2))
    half = data.numel() // 2
    copy_us = time_calls(lambda: data[:half].copy_(data[half:]))
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    device_bytes = data.view(torch.uint8)[: 1 << 28]
    host_us = time_calls(lambda: device_bytes.copy_(host, non_blocking=True), n_calls=5)
    size = 8192
    left, right = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    product_us = time_calls(lambda: left @ right, n_calls=7)
    small = torch.zeros(1, device="cuda")
    n_small = 200

    def touch() -> None:
        for _ in range(n_small):
            small.add_(1)

    return {
        "read_gbps": (1 << 31) / read_us / 1e3,
        "copy_gbps": (1 << 31) / copy_us / 1e3,
        "host_gbps": (1 << 28) / host_us / 1e3,
        "bf16_tflops": 2 * size**3 / product_us / 1e6,
        "launch_us": time_graph(touch) / n_small,
    }
