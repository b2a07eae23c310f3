"""Tensors from and to the bytes of safetensors files, one at a time."""

import os
import sys
from io import FileIO
from pathlib import Path

import torch

from deltacome_core.checkpoint import Checkpoint, locate_tensor
from deltacome_core.errors import InternalError, UserError
from deltacome_core.precision import SCHEMES
from deltacome_core.rounding import round_values

if sys.byteorder != "little":
    raise InternalError("tensors are read in place, which needs a little-endian machine")

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Give the safetensors name of a torch data type.

    Args:
        dtype: a data type safetensors can hold.

    Returns:
        For example "BF16".

    Raises:
        InternalError: safetensors has no such type.
    """
    if dtype not in _NAMES:
        raise InternalError(f"safetensors cannot hold {dtype}")
    return _NAMES[dtype]


def read_bytes(path: Path, start: int, size_bytes: int) -> torch.Tensor:
    """Read a range of a file into memory of its own.

    Args:
        path: the file.
        start: first byte.
        size_bytes: how many bytes.

    Returns:
        u8 [size_bytes], aligned for any data type.

    Raises:
        UserError: file_truncated.
    """
    buffer = torch.empty(size_bytes, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        read_into(buffer, file, start)
    return buffer


def read_into(buffer: torch.Tensor, file: FileIO, start: int) -> None:
    """Fill memory with a range of a file; threads may read the same open file.

    Args:
        buffer: u8 [size], on the CPU, adjacent.
        file: opened for reading, without a buffer; its own position stays.
        start: first byte.

    Raises:
        UserError: file_truncated.
    """
    view = buffer.numpy().data
    done = 0
    while done < len(view):
        # One call reads at most 2 GiB on Linux.
        n_read = os.preadv(file.fileno(), [view[done:]], start + done)
        if not n_read:
            expected, found = start + len(view), start + done
            name = Path(file.name).name
            raise UserError("file_truncated", file=name, found=found, expected=expected)
        done += n_read


def load_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Read one tensor; nothing else of the checkpoint enters memory.

    Args:
        checkpoint: an opened checkpoint.
        name: tensor name.

    Returns:
        The tensor in its own data type, on the CPU, at the checkpoint's precision.

    Raises:
        UserError: tensor_missing, file_truncated.
    """
    at = locate_tensor(checkpoint, name)
    raw = read_bytes(at.file, at.start, at.info.size_bytes)
    stored = raw.view(TORCH_DTYPES[at.info.dtype]).view(at.info.shape)
    if checkpoint.precision is None or not checkpoint.is_rounded(name):
        return stored
    return round_values(stored, SCHEMES[checkpoint.precision.scheme])


def as_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Widen to the type all arithmetic is done in.

    Args:
        tensor: any floating type.

    Returns:
        f32 of the same shape; the same tensor when it already is.
    """
    return tensor.to(torch.float32)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """View a tensor as the bytes a safetensors file holds.

    Args:
        tensor: any type and shape, on any device.

    Returns:
        Its elements in row-major order, little-endian.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 1:
        # One element counts as contiguous whatever its stride says, and then has no byte view.
        flat = flat.as_strided((1,), (1,))
    return flat.view(torch.uint8).numpy().data
