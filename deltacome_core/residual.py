"""Read a residual, the one file that makes a lossy delta exact; see docs/format.md."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from deltacome_core import strict_json
from deltacome_core.container import Delta, range_reader
from deltacome_core.delta_folder import StoredTensor, read_data_header
from deltacome_core.entries import CodedEntry, expected_tensors
from deltacome_core.entries_json import parse_entries
from deltacome_core.errors import UserError
from deltacome_core.fields import Fields, invalid
from deltacome_core.lossless import decode_tensor
from deltacome_core.manifest import MANIFEST_NAME, MAX_FILES, MAX_MANIFEST_BYTES
from deltacome_core.packed import CodedTensor
from deltacome_core.safetensors_file import read_chunks

FORMAT_NAME = "deltacome-residual"
FORMAT_VERSION = 1
HEAD_TENSOR = "residual"
_DIGEST_CHARS_SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """An opened residual; tensors that the delta restores exactly have no entry."""

    entries: dict[str, CodedEntry]
    stored: dict[str, StoredTensor]

    def restore(self, name: str, rebuilt: torch.Tensor) -> torch.Tensor:
        """Make one rebuilt tensor exact.

        Args:
            name: tensor name.
            rebuilt: what the delta gives, in the fine-tune's dtype, on the CPU.

        Returns:
            The fine-tune's tensor.

        Raises:
            UserError: delta_invalid when the result has another sha256 than its entry says.
        """
        if name not in self.entries:
            return rebuilt
        read = range_reader(self.stored[f"coded.{name}"])
        return decode_tensor(CodedTensor(entry=self.entries[name], read=read), rebuilt)


def row_count(shape: tuple[int, ...]) -> int:
    """Count rows as coded entries do.

    Args:
        shape: of a tensor.

    Returns:
        The first dimension, or 1 for a tensor without dimensions.
    """
    return shape[0] if shape else 1


def delta_digest(folder: Path) -> str:
    """Name a delta by its manifest.

    Args:
        folder: the delta.

    Returns:
        sha256 of delta.json in hexadecimal.
    """
    return hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()


def _read_head(path: Path, stored: dict[str, StoredTensor]) -> Fields:
    at = stored.get(HEAD_TENSOR)
    if at is None or at.info.dtype != "U8" or at.info.size_bytes > MAX_MANIFEST_BYTES:
        raise invalid(f"{path.name} is not a residual")
    raw = b"".join(read_chunks(path, at.start, at.info.size_bytes))
    try:
        document = strict_json.loads(raw)
    except ValueError as error:
        raise invalid(f"{path.name}: {str(error)[:120]}") from None
    fields = Fields(document, where=path.name)
    if fields.text("format") != FORMAT_NAME:
        raise invalid(f"{path.name} is not a residual")
    version = fields.natural("format_version")
    if version != FORMAT_VERSION:
        raise UserError("delta_version_unsupported", found=version, supported=FORMAT_VERSION)
    return fields


def _check_owner(path: Path, owner: str, delta: Delta) -> None:
    ours = delta_digest(delta.folder.path)
    if owner != ours:
        raise UserError(
            "residual_mismatch",
            file=path.name,
            expected=owner[:_DIGEST_CHARS_SHOWN],
            found=ours[:_DIGEST_CHARS_SHOWN],
        )


def _check_entries(fields: Fields, delta: Delta) -> dict[str, CodedEntry]:
    entries: dict[str, CodedEntry] = {}
    for entry in parse_entries(fields.take("entries")):
        own = delta.entries.get(entry.name)
        if own is None or (own.dtype, own.shape) != (entry.dtype, entry.shape):
            raise fields.invalid(f"the delta has no tensor {entry.name} of this type and shape")
        if not isinstance(entry, CodedEntry) or entry.base_rows != row_count(entry.shape):
            raise fields.invalid(f"{entry.name} is not coded as a residual")
        entries[entry.name] = entry
    return entries


def open_residual(path: Path, delta: Delta) -> Residual:
    """Check that a residual is whole and belongs to a delta.

    Args:
        path: the file.
        delta: the delta it shall make exact.

    Returns:
        The residual.

    Raises:
        UserError: file_missing, residual_mismatch, delta_invalid, delta_version_unsupported,
            name_unsafe.
    """
    if not path.is_file():
        raise UserError("file_missing", file=path.name)
    header = read_data_header(path)
    stored = {
        info.name: StoredTensor(file=path, info=info, start=header.data_start + info.start)
        for info in header.tensors
    }
    fields = _read_head(path, stored)
    _check_owner(path, fields.sha256("delta"), delta)
    entries = _check_entries(fields, delta)
    tools = fields.child("tools")
    for name in tools.keys(limit=MAX_FILES):
        tools.text(name)
    fields.done()
    found = {n: (at.info.dtype, at.info.shape) for n, at in stored.items() if n != HEAD_TENSOR}
    if found != expected_tensors(entries.values()):
        raise invalid(f"{path.name} does not hold what its entries say")
    return Residual(entries=entries, stored=stored)
