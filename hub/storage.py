"""Content-addressed bytes: a key is the sha256 of what it holds, so a second put is a no-op."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from django.conf import settings

from deltacome_core.errors import InternalError, UserError

if TYPE_CHECKING:
    from botocore.client import BaseClient

CHUNK_BYTES = 2**20
# S3 takes at most 10,000 parts of an object; 64 MiB each reaches 640 GB.
S3_PART_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBlob:
    sha256: str
    size_bytes: int


# Called with the digest before the bytes get their name: from then on pruning spares them.
Claim = Callable[[StoredBlob], object]


class BlobStore(Protocol):
    def put(self, chunks: Iterable[bytes], claim: Claim) -> StoredBlob: ...

    def put_file(self, path: Path, claim: Claim) -> StoredBlob: ...

    def has(self, sha256: str) -> bool: ...

    def read(self, sha256: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield the bytes [start, end)."""
        ...

    def delete(self, sha256: str) -> None: ...


class LocalStore:
    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, sha256: str) -> Path:
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):  # noqa: PLR2004  hex digits of a sha256
            raise InternalError(f"not a sha256: {sha256!r}")
        return self.root / "sha256" / sha256[:2] / sha256[2:4] / sha256

    def put(self, chunks: Iterable[bytes], claim: Claim) -> StoredBlob:
        scratch = self.root / "incoming"
        scratch.mkdir(parents=True, exist_ok=True)
        digest, size_bytes = hashlib.sha256(), 0
        with disk_errors(), tempfile.NamedTemporaryFile(dir=scratch, delete=False) as file:
            temporary = Path(file.name)
            try:
                for chunk in chunks:
                    digest.update(chunk)
                    size_bytes += len(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
                stored = StoredBlob(sha256=digest.hexdigest(), size_bytes=size_bytes)
                claim(stored)
                self._publish(temporary, stored.sha256)
            finally:
                temporary.unlink(missing_ok=True)
        return stored

    def put_file(self, path: Path, claim: Claim) -> StoredBlob:
        return self.put(read_chunks(path), claim)

    def has(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

    def read(self, sha256: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        return read_chunks(self.path(sha256), start=start, end=end)

    def delete(self, sha256: str) -> None:
        self.path(sha256).unlink(missing_ok=True)

    def _publish(self, temporary: Path, sha256: str) -> None:
        target = self.path(sha256)
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.chmod(0o444)
        temporary.rename(target)
        for folder in (target.parent, target.parent.parent, target.parent.parent.parent):
            sync_folder(folder)


class S3Store:
    def __init__(self, client: "BaseClient", bucket: str) -> None:
        self.client: Any = client
        self.bucket = bucket

    def key(self, sha256: str) -> str:
        return f"sha256/{sha256[:2]}/{sha256[2:4]}/{sha256}"

    def put(self, chunks: Iterable[bytes], claim: Claim) -> StoredBlob:
        # The key is known only after the last byte, so the bytes pass through a local file.
        spool = settings.DATA_DIR / "spool"
        spool.mkdir(parents=True, exist_ok=True)
        with disk_errors(), tempfile.NamedTemporaryFile(dir=spool) as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            return self.put_file(Path(file.name), claim)

    def put_file(self, path: Path, claim: Claim) -> StoredBlob:
        from boto3.s3.transfer import TransferConfig

        digest = hashlib.sha256()
        for chunk in read_chunks(path):
            digest.update(chunk)
        stored = StoredBlob(sha256=digest.hexdigest(), size_bytes=path.stat().st_size)
        claim(stored)
        if not self.has(stored.sha256):
            config = TransferConfig(
                multipart_threshold=S3_PART_BYTES, multipart_chunksize=S3_PART_BYTES
            )
            self.client.upload_file(str(path), self.bucket, self.key(stored.sha256), Config=config)
        return stored

    def has(self, sha256: str) -> bool:
        from botocore.exceptions import ClientError

        try:
            self.client.head_object(Bucket=self.bucket, Key=self.key(sha256))
        except ClientError as error:
            if error.response["Error"]["Code"] in {"404", "NoSuchKey", "NotFound"}:
                return False
            raise
        return True

    def read(self, sha256: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        if end is not None and end <= start:
            return
        span = (
            {}
            if not start and end is None
            else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        )
        found = self.client.get_object(Bucket=self.bucket, Key=self.key(sha256), **span)
        with closing(found["Body"]) as body:
            yield from body.iter_chunks(CHUNK_BYTES)

    def delete(self, sha256: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=self.key(sha256))


def get_store() -> BlobStore:
    if settings.BLOB_STORE == "s3":
        client = _s3_client(settings.S3_ENDPOINT_URL, settings.S3_REGION)
        return S3Store(client, settings.S3_BUCKET)
    return LocalStore(settings.DATA_DIR / "blobs")


@lru_cache(maxsize=4)
def _s3_client(endpoint_url: str, region: str) -> "BaseClient":
    import boto3

    return boto3.client("s3", endpoint_url=endpoint_url or None, region_name=region)


def read_chunks(path: Path, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from read_span(file, start=start, end=end)


def read_span(file: IO[bytes], *, start: int, end: int | None) -> Iterator[bytes]:
    file.seek(start)
    left = None if end is None else end - start
    while chunk := file.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left)):
        yield chunk
        left = None if left is None else left - len(chunk)


def is_writable() -> bool:
    try:
        settings.DATA_DIR.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.DATA_DIR):
            return True
    except OSError:
        return False


def require_space(needed_bytes: int) -> None:
    """Refuse early what would fill the disk.

    Raises:
        UserError: disk_full.
    """
    settings.DATA_DIR.mkdir(parents=True, exist_ok=True)
    spare_bytes = shutil.disk_usage(settings.DATA_DIR).free - settings.FREE_SPACE_FLOOR_BYTES
    if spare_bytes < needed_bytes:
        raise UserError("disk_full", needed_bytes=needed_bytes, spare_bytes=max(0, spare_bytes))


@contextmanager
def disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise UserError("disk_full", needed_bytes="more", spare_bytes="none") from error
        raise


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
