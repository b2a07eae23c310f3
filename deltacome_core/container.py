"""Read a delta folder as packed tensors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from deltacome_core.delta_folder import DeltaFolder, StoredTensor, open_folder
from deltacome_core.entries import (
    CodedEntry,
    DeltaEntry,
    ExactEntry,
    MatrixEntry,
    RowsEntry,
    UnchangedEntry,
)
from deltacome_core.errors import UserError
from deltacome_core.manifest import DeltaManifest
from deltacome_core.packed import CodedTensor, ExactTensor, PackedLinear, PackedStack, PackedTensor
from deltacome_core.payload import check_packed, matrices_from_payload, rows_from_payload
from deltacome_core.tensors import TORCH_DTYPES, read_bytes, tensor_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """An opened delta; tensors are read when asked for.

    read: gives the bytes of a file from a start on, u8 [size] aligned for any data type.
    """

    folder: DeltaFolder
    entries: dict[str, DeltaEntry]
    offsets: dict[str, int]
    read: Callable[[Path, int, int], torch.Tensor] = read_bytes

    @property
    def manifest(self) -> DeltaManifest:
        return self.folder.manifest

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.entries)

    @property
    def groups(self) -> dict[str, tuple[MatrixEntry, ...]]:
        """Low-rank and direct entries by payload, each in the order they lie in it."""
        groups: dict[str, tuple[MatrixEntry, ...]] = {}
        for entry in self.entries.values():
            if isinstance(entry, MatrixEntry):
                groups[entry.group] = (*groups.get(entry.group, ()), entry)
        return groups

    def entry(self, name: str) -> DeltaEntry:
        if name not in self.entries:
            raise UserError("tensor_missing", tensors=[name])
        return self.entries[name]

    def _read(self, stored: str, start: int = 0, size_bytes: int | None = None) -> torch.Tensor:
        at = self.folder.stored[stored]
        wanted = at.info.size_bytes if size_bytes is None else size_bytes
        return self.read(at.file, at.start + start, wanted)

    def _read_whole(self, stored: str) -> torch.Tensor:
        info = self.folder.stored[stored].info
        return self._read(stored).view(TORCH_DTYPES[info.dtype]).view(info.shape)

    def load(self, name: str) -> PackedTensor | None:
        """Read one tensor and check its numbers.

        Args:
            name: tensor name of the fine-tune.

        Returns:
            The packed tensor on the CPU, or None when the backbone's is unchanged.

        Raises:
            UserError: tensor_missing, delta_invalid.
        """
        entry = self.entry(name)
        if isinstance(entry, UnchangedEntry):
            return None
        if isinstance(entry, ExactEntry):
            return ExactTensor(name=name, value=self._read_whole(f"exact.{name}"))
        if isinstance(entry, CodedEntry):
            return self.load_coded(entry)
        if isinstance(entry, RowsEntry):
            payload = self._read(f"packed.{name}")
            new_rows = self._read_whole(f"new.{name}") if entry.n_new else None
            rows = rows_from_payload(entry, payload, new_rows)
            check_packed(rows, payload, entry.payload)
            return rows
        payload = self._read(f"packed.{entry.group}", self.offsets[name], entry.size_bytes)
        return matrices_from_payload(entry, payload)

    def load_coded(self, entry: CodedEntry) -> CodedTensor:
        return CodedTensor(
            entry=entry, read=range_reader(self.folder.stored[f"coded.{entry.name}"])
        )

    def load_group(self, group: str) -> tuple[torch.Tensor, tuple[PackedLinear | PackedStack, ...]]:
        """Read all quantised matrices of a layer at once.

        Args:
            group: a key of `groups`.

        Returns:
            The payload as u8 [size], to be sent to a device in one copy, and the tensors as
            views of it.

        Raises:
            UserError: delta_invalid.
        """
        payload = self._read(f"packed.{group}")
        tensors = []
        for entry in self.groups[group]:
            own = payload[self.offsets[entry.name] :][: entry.size_bytes]
            tensors.append(matrices_from_payload(entry, own))
        return payload, tuple(tensors)

    def iter_groups(self) -> Iterator[tuple[str, tuple[PackedLinear | PackedStack, ...]]]:
        """Read layer by layer.

        Yields:
            The group and its tensors in file order.
        """
        for group in self.groups:
            yield group, self.load_group(group)[1]


def range_reader(at: StoredTensor) -> Callable[[int, int], memoryview]:
    """Give a reader of parts of a stored tensor.

    Args:
        at: where it lies.

    Returns:
        A function of (first byte, number of bytes) within the tensor.
    """
    return lambda start, size_bytes: tensor_bytes(read_bytes(at.file, at.start + start, size_bytes))


def open_delta(folder: Path, *, verify_digests: bool = True) -> Delta:
    """Open a delta and check everything that can be checked without its numbers.

    Args:
        folder: the delta.
        verify_digests: whether to hash every file, or only compare sizes.

    Returns:
        The delta.

    Raises:
        UserError: file_missing, file_digest_mismatch, delta_invalid, delta_version_unsupported,
            name_unsafe.
    """
    opened = open_folder(folder, verify_digests=verify_digests)
    offsets: dict[str, int] = {}
    ends: dict[str, int] = {}
    for entry in opened.manifest.entries:
        if isinstance(entry, MatrixEntry):
            offsets[entry.name] = ends.get(entry.group, 0)
            ends[entry.group] = offsets[entry.name] + entry.size_bytes
    entries = {entry.name: entry for entry in opened.manifest.entries}
    return Delta(folder=opened, entries=entries, offsets=offsets)
