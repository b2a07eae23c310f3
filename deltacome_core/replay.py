"""Many small steps on fixed tensors: one by one on a CPU, launched as one CUDA graph on a GPU."""

from collections.abc import Callable

import torch

from deltacome_core.device_memory import RECORDING


def record(steps: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Make steps that cost more to launch than to run cheap to repeat.

    Args:
        steps: works only on tensors that live as long as the result is used; it may be run before
            its inputs hold anything, and then twice.
        device: where those tensors are.

    Returns:
        Does the steps once more at each call, in the order of the caller's stream.
    """
    if device.type != "cuda":
        return steps
    with torch.cuda.device(device), RECORDING:
        side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Kernels are loaded at their first launch, which a capture does not allow.
            steps()
            side.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile; torch.cuda.graph() would also empty the cache.
            graph.capture_begin(capture_error_mode="thread_local")
            steps()
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)
    return graph.replay
