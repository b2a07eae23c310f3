"""Which tensor of a delta lies in which data file, and where: the writer and the planner agree."""

from math import prod

from deltacome_core.checkpoint import Layout
from deltacome_core.manifest import DATA_NAME, FORMAT_NAME, FORMAT_VERSION
from deltacome_core.safetensors_file import ITEM_BYTES

MAX_SHARD_BYTES = 5_000_000_000
DATA_METADATA = {"format": FORMAT_NAME, "format_version": str(FORMAT_VERSION)}


def tensor_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Count the bytes of a tensor.

    Args:
        dtype: as safetensors spells it.
        shape: its dimensions.

    Returns:
        Bytes.
    """
    return prod(shape) * ITEM_BYTES[dtype]


def _storage_rank(name: str, dtype: str) -> tuple[int, int]:
    # Payloads are multiples of 256 bytes and come first, then falling item sizes: so every
    # tensor starts on a multiple of its item size.
    return (0 if name.startswith("packed.") else 1, -ITEM_BYTES[dtype])


def cut_shards(layout: Layout, *, max_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[str]]:
    """Divide the tensors of a delta among its data files.

    Args:
        layout: what expected_tensors returned.
        max_bytes: data beyond this go into a further file.

    Returns:
        Tensor names in file order by file name; no file when there is no tensor.
    """
    shards: list[list[str]] = []
    room = 0
    for name in sorted(layout, key=lambda name: _storage_rank(name, layout[name][0])):
        size_bytes = tensor_size(*layout[name])
        if not shards or size_bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size_bytes
    if len(shards) == 1:
        return {DATA_NAME: shards[0]}
    return {
        f"delta-{number:05d}-of-{len(shards):05d}.safetensors": names
        for number, names in enumerate(shards, start=1)
    }
