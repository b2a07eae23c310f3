"""Blob rows beside the blob store: bytes that a row refers to are never pruned."""

from collections.abc import Iterable
from pathlib import Path

from django.conf import settings
from django.db import transaction
from django.db.models.functions import Now

from hub import storage
from hub.jobs import from_now
from hub.models import Blob


def keep_chunks(chunks: Iterable[bytes]) -> Blob:
    """Store the bytes and return their row.

    Raises:
        UserError: disk_full.
    """
    return Blob.objects.get(pk=storage.get_store().put(chunks, _claim).sha256)


def keep_file(path: Path) -> Blob:
    """Store a copy of the file and return its row.

    Raises:
        UserError: disk_full.
    """
    return Blob.objects.get(pk=storage.get_store().put_file(path, _claim).sha256)


def read_blob(blob: Blob) -> bytes:
    return b"".join(storage.get_store().read(blob.sha256))


def prune_blobs() -> int:
    """Delete the bytes that nothing refers to and nobody offered lately."""
    idle = Blob.objects.filter(
        files=None, upload_files=None, touched_at__lt=from_now(-settings.BLOB_GRACE_S)
    )
    return sum(_prune(sha256) for sha256 in idle.values_list("sha256", flat=True)[:1000])


def _claim(stored: storage.StoredBlob) -> None:
    # One statement: between looking for the row and writing it, pruning and writers come and go.
    Blob.objects.bulk_create(
        [Blob(sha256=stored.sha256, size_bytes=stored.size_bytes, touched_at=Now())],
        update_conflicts=True,
        unique_fields=["sha256"],
        update_fields=["touched_at"],
    )


def _prune(sha256: str) -> bool:
    with transaction.atomic():
        # The lock makes a writer of the same content wait; it then finds no row and no file.
        blob = Blob.objects.select_for_update().filter(pk=sha256).first()
        idle = Blob.objects.filter(
            pk=sha256,
            files=None,
            upload_files=None,
            touched_at__lt=from_now(-settings.BLOB_GRACE_S),
        )
        if blob is None or not idle.exists():
            return False
        blob.delete()
        storage.get_store().delete(sha256)
    return True
