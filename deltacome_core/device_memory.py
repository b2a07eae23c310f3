"""Memory of a GPU: handing cached blocks back, and saying what to do where there is too little."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deltacome_core.errors import UserError

# Below this a matrix of the next size finds its place, and asking the driver again costs more than
# it saves: layers of a 7B model leave less behind.
_SPARE_BYTES = 4 << 30

#: Held while a CUDA graph is recorded: emptying the cache waits for the device, which a capture on
#: it, by whichever thread, does not allow.
RECORDING = threading.Lock()


def return_spare(device: torch.device) -> None:
    """Give cached blocks back to the device where many gigabytes of them lie idle.

    Blocks of one size seldom fit tensors of another. Between two steps of unlike sizes those left
    from the first would otherwise stay beside the second's.

    Args:
        device: any; a CPU keeps no blocks.
    """
    if device.type != "cuda":
        return
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if idle > _SPARE_BYTES:
        with RECORDING:
            torch.cuda.empty_cache()


@contextmanager
def naming_shortage() -> Iterator[None]:
    """Raise what a device says when its memory is full as an error with a code.

    Raises:
        UserError: device_memory_short.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        # What else lies on the device follows the first sentences, at length.
        said = ". ".join(str(error).split(". ")[:2])
        raise UserError("device_memory_short", said=said) from error
