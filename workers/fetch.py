"""Bring a blob into a folder under its own name, without a second copy where that is possible."""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from deltacome_core.errors import UserError
from hub.storage import LocalStore, read_chunks


class BlobReader(Protocol):
    def read(self, sha256: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]: ...


def fetch_blob(blobs: BlobReader, sha256: str, target: Path) -> None:
    """Make `target` hold the blob; it appears whole and with the right digest, or not at all.

    Raises:
        UserError: file_digest_mismatch when the stored bytes are not what their name says.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(blobs, LocalStore) and _link(blobs.path(sha256), sha256, target):
        return
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".fetch-")
    try:
        with os.fdopen(handle, "wb") as copy:
            found = _digest(_copied(blobs.read(sha256), copy.write))
            copy.flush()
            os.fsync(copy.fileno())
        _check(found, sha256, target)
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)


def _link(source: Path, sha256: str, target: Path) -> bool:
    """Stored blobs never change, so a second name for the same bytes is as good as a copy."""
    _check(_digest(read_chunks(source)), sha256, target)
    try:
        target.unlink(missing_ok=True)
        target.hardlink_to(source)
    except OSError:
        # Another file system, or one without hard links.
        return False
    return True


def _copied(chunks: Iterable[bytes], write: "Write") -> Iterator[bytes]:
    for chunk in chunks:
        write(chunk)
        yield chunk


def _digest(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _check(found: str, expected: str, target: Path) -> None:
    if found != expected:
        raise UserError("file_digest_mismatch", file=target.name)


class Write(Protocol):
    def __call__(self, data: bytes, /) -> int: ...
