"""Open a delta folder without torch: manifest, files, and where each payload lies."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from deltacome_core import messages
from deltacome_core.checkpoint import Layout
from deltacome_core.entries import expected_tensors
from deltacome_core.errors import UserError
from deltacome_core.fields import invalid
from deltacome_core.manifest import DeltaManifest, FileRecord, read_manifest
from deltacome_core.safetensors_file import Header, TensorInfo, read_chunks, read_header


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of a data file; `start` counts from the first byte of the file."""

    file: Path
    info: TensorInfo
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaFolder:
    """A delta whose manifest, file list and data headers agree."""

    path: Path
    manifest: DeltaManifest
    stored: dict[str, StoredTensor]


def hash_file(path: Path) -> FileRecord:
    """Hash a file.

    Args:
        path: the file.

    Returns:
        sha256 in hexadecimal, and the size.
    """
    size_bytes = path.stat().st_size
    digest = hashlib.sha256()
    for chunk in read_chunks(path, 0, size_bytes):
        digest.update(chunk)
    return FileRecord(sha256=digest.hexdigest(), size_bytes=size_bytes)


def _check_files(folder: Path, manifest: DeltaManifest, *, verify_digests: bool) -> None:
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise UserError("file_missing", file=name)
        same = path.stat().st_size == record.size_bytes
        if not same or (verify_digests and hash_file(path) != record):
            raise UserError("file_digest_mismatch", file=name)


def read_data_header(path: Path) -> Header:
    """Read the header of a file that a delta, or its residual, consists of.

    Args:
        path: a safetensors file.

    Returns:
        The header.

    Raises:
        UserError: delta_invalid, whatever is wrong with it.
    """
    try:
        return read_header(path)
    except UserError as error:
        message = messages.explain(error.code, error.params)
        reason = message.what.rstrip(".") if message else error.code
        raise invalid(reason) from None


def _compare(found: Layout, expected: Layout) -> None:
    for name in sorted(expected):
        if name not in found:
            raise invalid(f"the tensor {name} is missing")
        if found[name] != expected[name]:
            (dtype, shape), (real_dtype, real_shape) = expected[name], found[name]
            raise invalid(
                f"the tensor {name} is {real_dtype} {list(real_shape)}, "
                f"its entry needs {dtype} {list(shape)}"
            )
    unknown = sorted(found.keys() - expected.keys())
    if unknown:
        raise invalid(f"the tensor {unknown[0]} belongs to no entry")


def open_folder(folder: Path, *, verify_digests: bool) -> DeltaFolder:
    """Check that manifest, files and data headers of a delta agree.

    Args:
        folder: the delta.
        verify_digests: whether to hash every file, or only compare sizes.

    Returns:
        The manifest and the place of every stored tensor.

    Raises:
        UserError: file_missing, file_digest_mismatch, delta_invalid, delta_version_unsupported,
            name_unsafe.
    """
    manifest = read_manifest(folder)
    _check_files(folder, manifest, verify_digests=verify_digests)
    stored: dict[str, StoredTensor] = {}
    for name in manifest.data_files:
        header = read_data_header(folder / name)
        for info in header.tensors:
            if info.name in stored:
                raise invalid(f"the tensor {info.name} is stored twice")
            start = header.data_start + info.start
            stored[info.name] = StoredTensor(file=folder / name, info=info, start=start)
    found = {name: (at.info.dtype, at.info.shape) for name, at in stored.items()}
    _compare(found, expected_tensors(manifest.entries))
    return DeltaFolder(path=folder, manifest=manifest, stored=stored)
