"""The data files of a delta in memory, read once by many threads and hashed as they arrive."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from deltacome_core.delta_folder import DeltaFolder, hash_file
from deltacome_core.errors import UserError
from deltacome_core.layout import MATRIX_ALIGNMENT_BYTES, SECTION_ALIGNMENT_BYTES, align_up
from deltacome_core.tensors import read_into

# Long enough that a thread seldom waits for the interpreter, short enough to share out.
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """A file from byte `first` of the memory on; blocks in order, each done when it is read."""

    first: int
    size_bytes: int
    blocks: tuple["Future[None]", ...]


class HeldFiles:
    """Reading begins at once; whoever asks for bytes waits until they are there."""

    def __init__(self, folder: DeltaFolder, pool: ThreadPoolExecutor, *, pin: bool = False) -> None:
        """Begin to read.

        Args:
            folder: an opened delta.
            pool: threads to read with; they do nothing else until all is read.
            pin: read into page-locked memory, from which a GPU copies at full rate.
        """
        self._folder = folder
        first_of: dict[Path, int] = {}
        for at in folder.stored.values():
            first_of[at.file] = min(at.start, first_of.get(at.file, at.start))
        places, end = {}, 0
        for file, data_start in first_of.items():
            # Behind the header matrices lie as they do in their payloads.
            first = align_up(end + data_start, MATRIX_ALIGNMENT_BYTES) - data_start
            places[file] = first
            end = first + folder.manifest.files[file.name].size_bytes
        #: u8, all data files one behind the other.
        self.memory = torch.empty(end, dtype=torch.uint8, pin_memory=pin)
        self._files = {file: self._begin(file, first, pool) for file, first in places.items()}

    def _begin(self, file: Path, first: int, pool: ThreadPoolExecutor) -> _Held:
        size_bytes = self._folder.manifest.files[file.name].size_bytes
        blocks = tuple(
            pool.submit(read_into, block, file, number * _BLOCK_BYTES)
            for number, block in enumerate(
                torch.split(self.memory[first : first + size_bytes], _BLOCK_BYTES)
            )
        )
        return _Held(first=first, size_bytes=size_bytes, blocks=blocks)

    def read(self, path: Path, start: int, size_bytes: int) -> torch.Tensor:
        """Give a range of a file; the way `tensors.read_bytes` does, but nothing is copied.

        Args:
            path: one of the data files.
            start: first byte.
            size_bytes: how many bytes.

        Returns:
            u8 [size_bytes] of the memory, aligned for any data type; a copy where it is not.

        Raises:
            UserError: file_truncated.
        """
        held = self._files[path]
        for block in held.blocks[start // _BLOCK_BYTES : -(-(start + size_bytes) // _BLOCK_BYTES)]:
            block.result()
        found = self.memory[held.first + start : held.first + start + size_bytes]
        return found if found.data_ptr() % SECTION_ALIGNMENT_BYTES == 0 else found.clone()

    def check(self) -> None:
        """Compare all files of the delta with its manifest: these from memory, as they arrive.

        Raises:
            UserError: file_digest_mismatch, file_truncated.
        """
        for name, record in self._folder.manifest.files.items():
            path = self._folder.path / name
            if path in self._files:
                digest = hashlib.sha256()
                for block in self._blocks(self._files[path]):
                    digest.update(block)
                is_same = digest.hexdigest() == record.sha256
            else:
                is_same = hash_file(path) == record
            if not is_same:
                raise UserError("file_digest_mismatch", file=name)

    def _blocks(self, held: _Held) -> Iterator[memoryview]:
        view = self.memory.numpy().data
        for number, block in enumerate(held.blocks):
            block.result()
            start = held.first + number * _BLOCK_BYTES
            yield view[start : min(start + _BLOCK_BYTES, held.first + held.size_bytes)]
