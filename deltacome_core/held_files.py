"""The data files of a delta in memory, read once by many threads and hashed as they arrive."""

import hashlib
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch

from deltacome_core.delta_folder import DeltaFolder, hash_file
from deltacome_core.errors import UserError
from deltacome_core.layout import MATRIX_ALIGNMENT_BYTES, SECTION_ALIGNMENT_BYTES, align_up
from deltacome_core.tensors import read_into

# Long enough that a thread seldom waits for the interpreter, short enough that little is left to
# hash when the last one has come.
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """A file from byte `first` of the memory on; blocks by number, each done when it is read."""

    first: int
    size_bytes: int
    blocks: dict[int, "Future[None]"]


class HeldFiles:
    """Reading begins at once; whoever asks for bytes waits until they are there."""

    def __init__(
        self,
        folder: DeltaFolder,
        pool: ThreadPoolExecutor,
        *,
        pin: bool = False,
        first: Collection[str] = (),
    ) -> None:
        """Begin to read.

        Args:
            folder: an opened delta.
            pool: threads to read with; whatever else they are given waits until all is read, so
                `check` belongs to another one.
            pin: read into page-locked memory, from which a GPU copies at full rate. It is as large
                as the data files; torch rounds it up to a power of two, and keeps it for the next
                delta when this one has let go of it.
            first: stored tensors to read before all others, which come as they lie.
        """
        self._folder = folder
        wanted = {
            (at.file, number)
            for at in map(folder.stored.__getitem__, first)
            for number in _blocks_of(at.start, at.info.size_bytes)
        }
        first_of: dict[Path, int] = {}
        for at in folder.stored.values():
            first_of[at.file] = min(at.start, first_of.get(at.file, at.start))
        places, end = {}, 0
        for file, data_start in first_of.items():
            # Behind the header matrices lie as they do in their payloads.
            place = align_up(end + data_start, MATRIX_ALIGNMENT_BYTES) - data_start
            places[file] = place
            end = place + folder.manifest.files[file.name].size_bytes
        #: u8, all data files one behind the other.
        self.memory = torch.empty(end, dtype=torch.uint8, pin_memory=pin)
        self._files = {
            file: _Held(
                first=place, size_bytes=folder.manifest.files[file.name].size_bytes, blocks={}
            )
            for file, place in places.items()
        }
        every = [
            (file, number)
            for file, held in self._files.items()
            for number in _blocks_of(0, held.size_bytes)
        ]
        # Opened once: a thread that calls the system waits afterwards until it may run Python,
        # behind whoever describes what has arrived.
        opened = {file: file.open("rb", buffering=0) for file in self._files}
        for file, number in sorted(every, key=lambda block: block not in wanted):
            held = self._files[file]
            part = self.memory[slice(*_bounds(held, number))]
            start = number * _BLOCK_BYTES
            held.blocks[number] = pool.submit(read_into, part, opened[file], start)
        for file, held in self._files.items():
            pool.submit(_close_when_read, opened[file], list(held.blocks.values()))

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
        for number in _blocks_of(start, size_bytes):
            held.blocks[number].result()
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
        """All that has arrived since the last piece, at least one block."""
        view = self.memory.numpy().data
        number = 0
        while number < len(held.blocks):
            begins, _ = _bounds(held, number)
            held.blocks[number].result()
            # Few pieces: after each one the thread waits until it may run Python again.
            while number + 1 < len(held.blocks) and held.blocks[number + 1].done():
                number += 1
                held.blocks[number].result()
            _, ends = _bounds(held, number)
            yield view[begins:ends]
            number += 1


def _close_when_read(file: FileIO, blocks: Iterable["Future[None]"]) -> None:
    # Those before it in the pool have begun: none of them waits for this thread.
    wait(blocks)
    file.close()


def _blocks_of(start: int, size_bytes: int) -> range:
    """Numbers of the blocks of a file that a range of it touches."""
    return range(start // _BLOCK_BYTES, -(-(start + size_bytes) // _BLOCK_BYTES))


def _bounds(held: _Held, number: int) -> tuple[int, int]:
    """Where a block begins and ends in the memory."""
    start = number * _BLOCK_BYTES
    end = min(start + _BLOCK_BYTES, held.size_bytes)
    return held.first + start, held.first + end
