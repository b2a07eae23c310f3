"""A checkpoint arrives in parts: headers first, checked before gigabytes move, resumable always."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from django.conf import settings
from django.db import transaction
from django.db.models import Q, QuerySet
from django.db.models.functions import Now

from deltacome_core.checkpoint import Layout
from deltacome_core.errors import UserError
from deltacome_core.safetensors_file import parse_header
from hub import backbones, jobs, parts, storage
from hub.jobs import from_now
from hub.models import Job, Part, Repo, Revision, Upload, UploadFile

MAX_LISTED_PARTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStatus:
    index: int
    path: str
    size_bytes: int
    needs_header: bool
    header_ok: bool
    n_parts: int
    parts: tuple[int, ...]


def put_header(upload: Upload, index: int, raw: bytes) -> UploadFile:
    """Check the first bytes of a safetensors file; with the last header, check the layout.

    Args:
        upload: an open upload.
        index: number of the file.
        raw: the file's first bytes, at least up to the end of the header.

    Raises:
        UserError: what is wrong with the header, or backbone_mismatch.
    """
    file = find_file(upload, index)
    if not file.needs_header:
        raise UserError("header_not_wanted", file=file.path)
    with _refusing(upload):
        header = parse_header(raw, file_size_bytes=file.size_bytes, file=file.path)
    checked = raw[: header.data_start]
    digest = hashlib.sha256(checked).hexdigest()
    if file.header_ok and file.header_sha256 != digest:
        raise UserError("header_differs", file=file.path)
    parts.write_header(file, checked)
    file.header_ok, file.header_sha256 = True, digest
    file.save(update_fields=["header_ok", "header_sha256"])
    if not _files_without_header(upload).exists():
        check_layout(upload)
    return file


@contextmanager
def _refusing(upload: Upload) -> Iterator[None]:
    """End an upload whose weights cannot be used; once parts may have come, nothing ends it."""
    try:
        yield
    except UserError as error:
        # A header cut short may have lost its rest on the way: that one can be sent again.
        if error.code != "header_truncated" and _refuse(upload, error):
            parts.delete_parts(upload.pk)
        raise


def _refuse(upload: Upload, error: UserError) -> int:
    waiting = Upload.objects.filter(pk=upload.pk, state=Upload.State.OPEN, layout__isnull=True)
    refusal = {"code": error.code, "params": error.params}
    return waiting.update(state=Upload.State.REFUSED, refusal=refusal)


def why_closed(upload: Upload) -> UserError:
    """Say why an upload takes nothing more: a refusal is told again, as often as it is asked."""
    upload.refresh_from_db(fields=["state", "refusal"])
    if upload.refusal is not None:
        return UserError(upload.refusal["code"], **upload.refusal["params"])
    return UserError("upload_closed", state=upload.state.lower())


def check_layout(upload: Upload) -> None:
    """Compare the fine-tune's tensors with the named backbone, or find one that fits.

    Raises:
        UserError: duplicate_tensor, backbone_mismatch, backbone_unknown.
    """
    with _refusing(upload):
        _compare_layout(upload, _read_headers(upload))
    upload.save(update_fields=["layout", "backbone"])


def _compare_layout(upload: Upload, layout: Layout) -> None:
    if upload.repo.kind == Repo.Kind.BACKBONE:
        upload.layout = {"n_tensors": len(layout)}
    else:
        named = [upload.backbone] if upload.backbone else backbones.visible_backbones(upload.owner)
        fits = backbones.find_fits(layout, named)
        report = fits[0].report
        upload.backbone = fits[0].revision
        upload.layout = {
            "n_tensors": len(layout),
            "matched": len(report.matched),
            "grown_rows": list(report.grown_rows),
            "missing": list(report.missing),
            "unexpected": list(report.unexpected),
            # Equal shapes may belong to several backbones: ingest decides by the weights.
            "candidates": [
                {"revision": str(fit.revision.pk), "name": str(fit.revision)} for fit in fits
            ],
        }


def _read_headers(upload: Upload) -> Layout:
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in upload.files.filter(path__endswith=".safetensors"):
        raw = parts.read_header(file)
        header = parse_header(raw, file_size_bytes=file.size_bytes, file=file.path)
        for info in header.tensors:
            if info.name in layout:
                raise UserError("duplicate_tensor", name=info.name, file=file.path)
            layout[info.name] = (info.dtype, info.shape)
    return layout


def store_part(
    upload: Upload, index: int, number: int, *, chunks: Iterable[bytes], sha256: str
) -> Part:
    """Write one part to disk, durably, if its length, digest and header are as announced.

    Raises:
        UserError: header_missing, part_number, part_too_large, part_too_small,
            part_digest_mismatch, header_differs, disk_full, upload_closed.
    """
    file = find_file(upload, index)
    if upload.layout is None:
        waiting = _files_without_header(upload).first()
        if waiting is not None:
            raise UserError("header_missing", file=waiting.path)
        check_layout(upload)
    expected_bytes = parts.expected_size(file, upload.part_size_bytes, number)
    storage.require_space(expected_bytes)
    parts.write_part(file, number, chunks=chunks, sha256=sha256, expected_bytes=expected_bytes)
    with transaction.atomic():
        is_open = Upload.objects.filter(pk=upload.pk, state=Upload.State.OPEN)
        if not is_open.update(expires_at=from_now(settings.UPLOAD_TTL_S)):
            raise why_closed(upload)
        part, _ = Part.objects.update_or_create(
            upload_file=file,
            number=number,
            defaults={"sha256": sha256, "size_bytes": expected_bytes},
        )
    return part


def upload_status(upload: Upload) -> tuple[FileStatus, ...]:
    """Tell which parts are held, so that any client can go on."""
    held: dict[object, list[int]] = {}
    rows = Part.objects.filter(upload_file__upload=upload).order_by("number")
    for file_id, number in rows.values_list("upload_file_id", "number"):
        held.setdefault(file_id, []).append(number)
    return tuple(
        FileStatus(
            index=file.index,
            path=file.path,
            size_bytes=file.size_bytes,
            needs_header=file.needs_header,
            header_ok=file.header_ok,
            n_parts=parts.count_parts(file, upload.part_size_bytes),
            parts=tuple(held.get(file.pk, ())),
        )
        for file in upload.files.all()
    )


def seal_upload(upload: Upload) -> Job:
    """Close the upload and queue its job; sealing twice gives the same job.

    Raises:
        UserError: header_missing, parts_missing, upload_closed.
    """
    if upload.state == Upload.State.SEALED:
        return upload.job
    _require_complete(upload)
    with transaction.atomic():
        row = Upload.objects.filter(pk=upload.pk, state=Upload.State.OPEN)
        if row.update(state=Upload.State.SEALED, sealed_at=Now()):
            job = _create_job(upload)
        else:
            upload.refresh_from_db()
            if upload.state != Upload.State.SEALED:
                raise why_closed(upload)
            return upload.job
    jobs.announce(job)
    return job


def _require_complete(upload: Upload) -> None:
    waiting = _files_without_header(upload).first()
    if upload.state == Upload.State.OPEN and waiting is not None:
        raise UserError("header_missing", file=waiting.path)
    missing = [
        f"{file.path}:{number}"
        for file in upload_status(upload)
        for number in sorted(set(range(file.n_parts)) - set(file.parts))
    ]
    if upload.state == Upload.State.OPEN and missing:
        listed = missing[:MAX_LISTED_PARTS]
        raise UserError("parts_missing", count=len(missing), parts=listed)


def _create_job(upload: Upload) -> Job:
    revision = Revision.objects.create(
        repo=upload.repo,
        backbone=upload.backbone,
        recipe=upload.spec,
        created_by=upload.owner,
    )
    kind = upload.repo.kind
    job = Job.objects.create(
        kind=kind, owner=upload.owner, upload=upload, revision=revision, step=jobs.STEPS[kind][0]
    )
    job.record()
    jobs.enqueue(job)
    job.refresh_from_db()
    return job


def abort_upload(upload: Upload) -> None:
    """Throw an open upload away; of a refused one nothing is left to throw.

    Raises:
        UserError: upload_closed.
    """
    if upload.state == Upload.State.REFUSED:
        return
    row = Upload.objects.filter(pk=upload.pk, state=Upload.State.OPEN)
    if not row.update(state=Upload.State.ABORTED):
        raise why_closed(upload)
    parts.delete_parts(upload.pk)


def find_file(upload: Upload, index: int) -> UploadFile:
    """Return the file of an open upload.

    Raises:
        UserError: upload_closed, not_found.
    """
    if upload.state != Upload.State.OPEN:
        raise why_closed(upload)
    file = upload.files.filter(index=index).first()
    if file is None:
        raise UserError("not_found")
    return file


def expire_uploads() -> int:
    """Abort what nobody continued, and let go of the sources that no job needs any more."""
    expired = Upload.objects.filter(state=Upload.State.OPEN, expires_at__lt=Now())
    ended = 0
    for upload_id in expired.values_list("pk", flat=True)[:1000]:
        if expired.filter(pk=upload_id).update(state=Upload.State.ABORTED):
            parts.delete_parts(upload_id)
            ended += 1
    # A failed job may be retried for a while; a finished one never reads its sources again.
    is_done = Q(job__state=Job.State.DONE)
    is_over = (
        Q(is_done, job__kind=Repo.Kind.BACKBONE)
        | Q(is_done, job__finished_at__lt=from_now(-settings.FINETUNE_KEEP_S))
        | Q(~is_done, job__finished_at__lt=from_now(-settings.UPLOAD_TTL_S))
    )
    over = Upload.objects.filter(is_over, state=Upload.State.SEALED)
    for upload in over.exclude(files__blob=None)[:1000]:
        release_sources(upload)
    return ended


def finish_sources(upload: Upload) -> None:
    """After publication: a fine-tune may be kept for a while, to be compared with its delta."""
    if settings.FINETUNE_KEEP_S > 0 and upload.repo.kind == Repo.Kind.DELTA:
        parts.delete_parts(upload.pk)
    else:
        release_sources(upload)


def release_sources(upload: Upload) -> None:
    """Drop the fine-tune's own bytes: the published delta stands in for them."""
    upload.files.update(blob=None)
    parts.delete_parts(upload.pk)


def _files_without_header(upload: Upload) -> QuerySet[UploadFile]:
    return upload.files.filter(path__endswith=".safetensors", header_ok=False)
