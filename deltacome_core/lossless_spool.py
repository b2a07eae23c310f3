"""Coded tensors on their way into a file: what is coded against what, and where it waits."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from deltacome_core.checkpoint import FLOATS, Checkpoint, locate_tensor
from deltacome_core.entries import CodedEntry, UnchangedEntry
from deltacome_core.lossless import (
    ElementReader,
    element_words,
    encode_blocks,
    plan_blocks,
    read_elements,
)
from deltacome_core.packed import CodedTensor

_SPOOL_BYTES = 64 << 20


class CodedSpool:
    """Holds coded tensors until their sizes are known; see open_spool."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def encode(
        self,
        name: str,
        tuned: Checkpoint,
        base: ElementReader | None,
        *,
        base_rows: int,
        sha256: str,
    ) -> CodedTensor:
        """Code a tensor into the spool.

        Args:
            name: its name.
            tuned: the checkpoint that has it.
            base: reads what it grew from.
            base_rows: how many of its first rows `base` has.
            sha256: of the tensor's bytes.

        Returns:
            The coded tensor; it can be read until the spool is closed.
        """
        info = locate_tensor(tuned, name).info
        n_predicted = base_rows * prod(info.shape[1:])
        start = self._file.seek(0, 2)
        size_bytes = self._append(
            encode_blocks(
                info.dtype,
                info.n_params,
                read_elements(tuned, name),
                base=base,
                n_predicted=n_predicted,
            )
        )
        entry = CodedEntry(
            name=name,
            dtype=info.dtype,
            shape=info.shape,
            base_rows=base_rows,
            size_bytes=size_bytes,
            sha256=sha256,
        )

        def read(offset: int, size: int) -> memoryview:
            self._file.seek(start + offset)
            return memoryview(self._file.read(size))

        return CodedTensor(entry=entry, read=read)

    def _append(self, blocks: Iterable[bytes]) -> int:
        return sum(self._file.write(block) for block in blocks)


@contextmanager
def open_spool(folder: Path) -> Iterator[CodedSpool]:
    """Make room for coded tensors: memory at first, then a file without a name.

    Args:
        folder: where that file is made.

    Yields:
        The spool; what was coded into it can be read until the block ends.
    """
    with tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES, dir=str(folder)) as file:
        yield CodedSpool(file)


def _is_castable(base: str, tuned: str) -> bool:
    return base == tuned or {base, tuned} <= FLOATS


def count_base_rows(base: Checkpoint, tuned: Checkpoint, name: str) -> int:
    """Say how many rows of a tensor grew from the backbone's.

    Args:
        base: the backbone.
        tuned: the fine-tune, which has the tensor.
        name: tensor name.

    Returns:
        Rows of the backbone's tensor, 1 for one without dimensions, 0 when it does not fit.
    """
    if name not in base.tensors:
        return 0
    old, new = base.tensors[name].info, tuned.tensors[name].info
    if len(old.shape) != len(new.shape) or not _is_castable(old.dtype, new.dtype):
        return 0
    if not new.shape:
        return 1
    fits = old.shape[1:] == new.shape[1:] and old.shape[0] <= new.shape[0]
    return old.shape[0] if fits else 0


def equals_cast(base: ElementReader, tuned: ElementReader, dtype: str, n_elements: int) -> bool:
    """Tell whether two tensors are the same bits after a cast.

    Args:
        base: reads the one to cast.
        tuned: reads the other, which has the type already.
        dtype: the type, as safetensors spells it.
        n_elements: elements of either.

    Returns:
        True when every bit agrees; unlike numbers, 0 and -0 do not.
    """
    return all(
        np.array_equal(
            element_words(base(block.start, block.stop), dtype),
            element_words(tuned(block.start, block.stop), dtype),
        )
        for block in plan_blocks(n_elements, n_elements)
    )


def code_tensor(
    spool: CodedSpool, base: Checkpoint, tuned: Checkpoint, name: str, *, sha256: str
) -> CodedTensor | UnchangedEntry:
    """Code one tensor of a fine-tune against the backbone's.

    Args:
        spool: takes the coded bytes.
        base: the backbone.
        tuned: the fine-tune, which has the tensor.
        name: tensor name.
        sha256: of the tensor's bytes.

    Returns:
        The coded tensor, or that it is the backbone's after a cast.
    """
    info, base_rows = tuned.tensors[name].info, count_base_rows(base, tuned, name)
    reader = read_elements(base, name) if base_rows else None
    if (
        reader is not None
        and base.tensors[name].info.shape == info.shape
        and equals_cast(reader, read_elements(tuned, name), info.dtype, info.n_params)
    ):
        return UnchangedEntry(name=name, dtype=info.dtype, shape=info.shape)
    return spool.encode(name, tuned, reader, base_rows=base_rows, sha256=sha256)
