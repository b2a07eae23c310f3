"""The stream beside the current one, one for each device."""

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
