"""How far a fine-tune is from a backbone: tells a fine-tune of another one before the work."""

import statistics
from math import isfinite, prod

import torch

from deltacome_core.checkpoint import FLOATS, Checkpoint, locate_tensor
from deltacome_core.entries import is_lowrank_shape
from deltacome_core.errors import UserError
from deltacome_core.safetensors_file import ITEM_BYTES
from deltacome_core.tensors import TORCH_DTYPES, as_float32, read_bytes

COMPARED_MATRICES = 24
# The first numbers of a matrix say as much as all of them.
COMPARED_NUMBERS = 1 << 20
# Weights that have nothing to do with each other differ by sqrt(1 + r^2), r being their ratio of
# sizes: by more than 1. Training on, however long, stayed below 0.5 wherever it was measured.
LARGEST_DISTANCE = 0.9


def measure_distance(base: Checkpoint, tuned: Checkpoint) -> float:
    """Compare some matrices that are spread through two models.

    A few matrices that were made anew, such as a projector, do not change a median.

    Args:
        base: the backbone.
        tuned: the fine-tune; at most 24 million numbers of each are read.

    Returns:
        The median of ||tuned - base|| / ||base||; 0 where no matrix can be compared.

    Raises:
        UserError: file_truncated.
    """
    ours, theirs = base.layout, tuned.layout
    shared = [
        name
        for name, (dtype, shape) in sorted(ours.items())
        if is_lowrank_shape(name, shape)
        and theirs.get(name, ("", ()))[1] == shape
        and {dtype, theirs[name][0]} <= FLOATS
    ]
    step = max(1.0, len(shared) / COMPARED_MATRICES)
    chosen = [shared[int(index * step)] for index in range(min(len(shared), COMPARED_MATRICES))]
    # NaN and infinity are the business of scan_checkpoint, which names them.
    found = [d for name in chosen if isfinite(d := _relative_difference(base, tuned, name))]
    return statistics.median(found) if found else 0.0


def check_related(base: Checkpoint, tuned: Checkpoint) -> None:
    """Refuse a fine-tune of another backbone of the same shapes, by a look at some matrices.

    Args:
        base: the backbone.
        tuned: the fine-tune.

    Raises:
        UserError: backbone_unrelated, file_truncated.
    """
    refuse_stranger(measure_distance(base, tuned))


def refuse_stranger(distance: float) -> None:
    """Refuse a distance that no fine-tune has.

    Args:
        distance: of measure_distance.

    Raises:
        UserError: backbone_unrelated with the distance and its limit.
    """
    if distance > LARGEST_DISTANCE:
        raise UserError(
            "backbone_unrelated", ratio=f"{distance:.2f}", limit=f"{LARGEST_DISTANCE:g}"
        )


def _relative_difference(base: Checkpoint, tuned: Checkpoint, name: str) -> float:
    before, after = _first_numbers(base, name), _first_numbers(tuned, name)
    moved, size = (torch.linalg.vector_norm(each) for each in (after - before, before))
    # A backbone without weights of its own is no relative of anything but itself.
    return float(moved / size) if float(size) else float(moved > 0)


def _first_numbers(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    at = locate_tensor(checkpoint, name)
    count = min(prod(at.info.shape), COMPARED_NUMBERS)
    raw = read_bytes(at.file, at.start, count * ITEM_BYTES[at.info.dtype])
    return as_float32(raw.view(TORCH_DTYPES[at.info.dtype]))
