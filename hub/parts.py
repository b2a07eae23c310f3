"""Where the parts of an open upload lie on disk: DATA_DIR/uploads/<upload>/<file>/."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from uuid import UUID

from django.conf import settings

from deltacome_core.errors import InternalError, UserError
from hub import blobs, storage
from hub.models import Blob, UploadFile

TEXT_SUFFIXES = (".json", ".txt", ".jsonl", ".jinja", ".md")


def count_parts(file: UploadFile, part_size_bytes: int) -> int:
    return -(-file.size_bytes // part_size_bytes)


def expected_size(file: UploadFile, part_size_bytes: int, number: int) -> int:
    """Return the length that part `number` must have.

    Raises:
        UserError: part_number.
    """
    last = count_parts(file, part_size_bytes) - 1
    if not 0 <= number <= last:
        raise UserError(
            "part_number", file=file.path, part=number, last=last, part_size_bytes=part_size_bytes
        )
    return min(part_size_bytes, file.size_bytes - number * part_size_bytes)


def write_header(file: UploadFile, raw: bytes) -> None:
    folder = _folder(file)
    with storage.disk_errors(), tempfile.NamedTemporaryFile(dir=folder, delete=False) as handle:
        handle.write(raw)
        handle.flush()
        os.fsync(handle.fileno())
        Path(handle.name).rename(folder / "header")
        storage.sync_folder(folder)


def read_header(file: UploadFile) -> bytes:
    return (_folder(file) / "header").read_bytes()


def write_part(
    file: UploadFile, number: int, *, chunks: Iterable[bytes], sha256: str, expected_bytes: int
) -> None:
    """Stream a part to its place, named by its digest; nothing is left of a refused one.

    Raises:
        UserError: part_too_large, part_too_small, part_digest_mismatch, header_differs,
            text_invalid, disk_full.
    """
    folder = _folder(file)
    facts: dict[str, str | int] = {"file": file.path, "part": number}
    digest, found_bytes = hashlib.sha256(), 0
    with storage.disk_errors(), tempfile.NamedTemporaryFile(dir=folder, delete=False) as handle:
        temporary = Path(handle.name)
        try:
            for chunk in chunks:
                found_bytes += len(chunk)
                if found_bytes > expected_bytes:
                    raise UserError("part_too_large", expected_bytes=expected_bytes, **facts)
                digest.update(chunk)
                handle.write(chunk)
            handle.flush()
            if found_bytes < expected_bytes:
                facts |= {"expected_bytes": expected_bytes, "found_bytes": found_bytes}
                raise UserError("part_too_small", **facts)
            if digest.hexdigest() != sha256:
                facts |= {"expected": sha256, "found": digest.hexdigest()}
                raise UserError("part_digest_mismatch", **facts)
            _check_content(file, number, temporary)
            os.fsync(handle.fileno())
            temporary.rename(folder / f"{number}.{sha256}")
            storage.sync_folder(folder)
        finally:
            temporary.unlink(missing_ok=True)


def _check_content(file: UploadFile, number: int, path: Path) -> None:
    """Hold the bytes against what was promised before they were sent."""
    if file.path.endswith(TEXT_SUFFIXES) and any(b"\0" in c for c in storage.read_chunks(path)):
        raise UserError("text_invalid", file=file.path)
    if not file.needs_header:
        return
    start = number * file.upload.part_size_bytes
    header = read_header(file)[start : start + path.stat().st_size]
    if header and b"".join(storage.read_chunks(path, end=len(header))) != header:
        raise UserError("header_differs", file=file.path)


def assemble_file(file: UploadFile) -> Blob:
    """Join the parts into one blob, each checked again, and remember it on the row.

    Raises:
        UserError: disk_full.
    """
    if file.blob is None:
        file.blob = blobs.keep_chunks(_read_parts(file))
        if file.blob.size_bytes != file.size_bytes:
            raise InternalError(f"{file.pk} has {file.blob.size_bytes} bytes")
        file.save(update_fields=["blob"])
    shutil.rmtree(_folder(file))
    return file.blob


def _read_parts(file: UploadFile) -> Iterator[bytes]:
    for part in file.parts.order_by("number"):
        digest = hashlib.sha256()
        for chunk in storage.read_chunks(_folder(file) / f"{part.number}.{part.sha256}"):
            digest.update(chunk)
            yield chunk
        if digest.hexdigest() != part.sha256:
            raise InternalError(f"part {part.pk} changed on disk")


def delete_parts(upload_id: UUID) -> None:
    shutil.rmtree(settings.DATA_DIR / "uploads" / str(upload_id), ignore_errors=True)


def _folder(file: UploadFile) -> Path:
    folder: Path = settings.DATA_DIR / "uploads" / str(file.upload_id) / str(file.index)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
