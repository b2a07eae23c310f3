"""The stream beside the current one, and copies to a device that nobody waits for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import torch

_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream with precedence over the default one.

    Args:
        device: a CUDA device.

    Returns:
        The same stream at every call.
    """
    if device not in _STREAMS:
        # The backbone's product fills the device: without precedence the deltas would wait for it.
        _STREAMS[device] = torch.cuda.Stream(device, priority=-1)
    return _STREAMS[device]


@contextmanager
def running_beside(device: torch.device) -> Iterator[Callable[[], None]]:
    """Queue work on the stream beside the current one; a device without streams runs it at once.

    Args:
        device: any.

    Yields:
        What lets the current stream wait for that work, to be called after it was queued.
    """
    if device.type != "cuda":
        yield lambda: None
        return
    main, side = torch.cuda.current_stream(device), side_stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield lambda: main.wait_stream(side)


def send(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy numbers to a device behind what it still has to do.

    A copy from memory that is not page-locked would first wait until all of that is done.

    Args:
        array: any shape and type that torch has too.
        device: where to.

    Returns:
        The numbers there; on a CPU the array itself.
    """
    return send_tensor(torch.from_numpy(array), device)


def send_tensor(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device behind what it still has to do, as `send` does.

    Args:
        tensor: any, on the CPU.
        device: where to.

    Returns:
        The tensor there; on a CPU the tensor itself.
    """
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
