"""The difference between two checkpoints, one tensor at a time, and what becomes of each tensor."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch

from deltacome_core.checkpoint import (
    Checkpoint,
    checkpoint_digest,
    is_vocabulary_tensor,
    locate_tensor,
)
from deltacome_core.entries import is_lowrank_shape
from deltacome_core.errors import UserError
from deltacome_core.plan import Subject
from deltacome_core.safetensors_file import read_chunks
from deltacome_core.tensors import TORCH_DTYPES, as_float32, load_tensor
from deltacome_core.vocabulary import count_changed_rows

_MATRIX_DIMENSIONS = 2
# Reading and hashing overlap; more threads than this only contend for memory bandwidth.
_MAX_SCAN_THREADS = 16
# The bits that are all set in NaN and infinity and in no number; e4m3fn has no infinity.
_EXPONENTS: dict[torch.dtype, tuple[type[np.unsignedinteger[Any]], int]] = {
    torch.float64: (np.uint64, 0x7FF0 << 48),
    torch.float32: (np.uint32, 0x7F80 << 16),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float16: (np.uint16, 0x7C00),
    torch.float8_e5m2: (np.uint8, 0x7C),
    torch.float8_e4m3fn: (np.uint8, 0x7F),
}


class TensorKind(StrEnum):
    """What a delta keeps of a tensor."""

    LOWRANK = "lowrank"
    ROWS = "rows"
    EXACT = "exact"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScannedCheckpoint:
    """A checkpoint whose weights were all read once: finite, and hashed."""

    checkpoint: Checkpoint
    hashes: dict[str, str]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPair:
    """One tensor of the fine-tune beside the backbone's, each in its own dtype.

    base is None for a tensor that only the fine-tune has.
    """

    name: str
    base: torch.Tensor | None
    tuned: torch.Tensor

    @property
    def kind(self) -> TensorKind:
        if self.base is None:
            return TensorKind.EXACT
        grown = self.base.shape != self.tuned.shape
        if not grown and torch.equal(self.base.to(self.tuned.dtype), self.tuned):
            return TensorKind.UNCHANGED
        if not self.tuned.is_floating_point():
            return TensorKind.EXACT
        if is_vocabulary_tensor(self.name) and self.tuned.ndim == 2:  # noqa: PLR2004 - a matrix
            return TensorKind.ROWS
        lowrank = is_lowrank_shape(self.name, tuple(self.tuned.shape))
        return TensorKind.LOWRANK if lowrank else TensorKind.EXACT

    def to(self, device: torch.device) -> "TensorPair":
        """Move both tensors: half the bytes of a difference in float32."""
        base = None if self.base is None else self.base.to(device)
        return TensorPair(name=self.name, base=base, tuned=self.tuned.to(device))

    def difference(self) -> torch.Tensor:
        """Return fine-tune minus backbone.

        Returns:
            float32 of the fine-tune's shape; both sides are widened before the subtraction.
        """
        if self.base is None:
            return as_float32(self.tuned)
        return as_float32(self.tuned) - as_float32(self.base)


def scan_checkpoint(checkpoint: Checkpoint) -> ScannedCheckpoint:
    """Read every weight once: hash it and refuse NaN and infinity.

    Args:
        checkpoint: an opened checkpoint.

    Returns:
        The checkpoint with its hashes and digest.

    Raises:
        UserError: nan_weights, naming tensors and files.
    """

    def scan(name: str) -> tuple[str, bool]:
        at = locate_tensor(checkpoint, name)
        dtype = TORCH_DTYPES[at.info.dtype]
        digest, finite = hashlib.sha256(), True
        for chunk in read_chunks(at.file, at.start, at.info.size_bytes):
            digest.update(chunk)
            finite = finite and _is_finite(chunk, dtype)
        return digest.hexdigest(), finite

    threads = min(_MAX_SCAN_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        results = dict(zip(checkpoint.tensors, pool.map(scan, checkpoint.tensors), strict=True))
    broken = [
        f"{name} ({checkpoint.tensors[name].file.name})"
        for name, (_, finite) in results.items()
        if not finite
    ]
    if broken:
        raise UserError("nan_weights", tensors=broken)
    hashes = {name: digest for name, (digest, _) in results.items()}
    return ScannedCheckpoint(
        checkpoint=checkpoint,
        hashes=hashes,
        digest=checkpoint_digest(checkpoint.layout, hashes),
    )


def _is_finite(chunk: bytes, dtype: torch.dtype) -> bool:
    """Tell whether whole elements of a tensor hold neither NaN nor infinity."""
    if not dtype.is_floating_point:
        return True
    words, exponent = _EXPONENTS[dtype]
    bits = np.frombuffer(chunk, dtype=words)
    return not bool(((bits & words(exponent)) == exponent).any())


def describe_subject(base: ScannedCheckpoint, tuned: ScannedCheckpoint) -> Subject:
    """Say what a plan can know of a fine-tune once both checkpoints were read.

    Args:
        base: the backbone.
        tuned: the fine-tune.

    Returns:
        Shapes, tensors that are equal, and how many rows of each vocabulary differ.
    """
    ours, theirs = tuned.checkpoint, base.checkpoint
    same = {
        name
        for name, place in ours.layout.items()
        if theirs.layout.get(name) == place and not theirs.is_rounded(name)
    }
    unchanged = {name for name in same if base.hashes[name] == tuned.hashes[name]}
    changed_rows = {
        name: count_changed_rows(load_tensor(theirs, name), load_tensor(ours, name))
        for name, (_, shape) in ours.layout.items()
        if is_vocabulary_tensor(name) and len(shape) == _MATRIX_DIMENSIONS
        if name in theirs.layout and name not in unchanged
    }
    return Subject(
        layout=ours.layout,
        source_bytes=ours.size_bytes,
        backbone=theirs.layout,
        unchanged=unchanged,
        changed_rows=changed_rows,
        sidecars=[path.name for path in ours.sidecars],
    )


def load_pair(base: Checkpoint, tuned: Checkpoint, name: str) -> TensorPair:
    """Read one tensor of the fine-tune and its counterpart.

    Args:
        base: the backbone.
        tuned: the fine-tune, which has the tensor.
        name: tensor name.

    Returns:
        The pair.
    """
    found = name in base.tensors
    return TensorPair(
        name=name,
        base=load_tensor(base, name) if found else None,
        tuned=load_tensor(tuned, name),
    )
