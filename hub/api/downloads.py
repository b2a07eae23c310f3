import re
from collections.abc import AsyncIterator, Iterator

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.utils.cache import patch_vary_headers
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.views import APIView

from deltacome_core.errors import UserError
from hub import access, catalog, storage
from hub.api.auth import Anyone
from hub.api.views import errors, release_connection
from hub.models import Blob, File, Repo

ONE_RANGE = re.compile(r"\Abytes=(\d{0,19})-(\d{0,19})\Z")
CONTENT_TYPES = {
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".safetensors": "application/octet-stream",
    ".model": "application/octet-stream",
}


class RevisionFile(APIView):
    permission_classes = [Anyone]

    @extend_schema(
        operation_id="download_file",
        parameters=[OpenApiParameter("Range", str, OpenApiParameter.HEADER)],
        responses={
            (200, "application/octet-stream"): OpenApiTypes.BINARY,
            (206, "application/octet-stream"): OpenApiTypes.BINARY,
            304: None,
            416: None,
        }
        | errors(),
    )
    def get(
        self, request: Request, namespace: str, name: str, revision: str, path: str
    ) -> HttpResponseBase:
        repo = access.get_repo(request.user, namespace, name)
        file = catalog.get_file(catalog.get_revision(repo, revision), path)
        response = _answer(request, file.blob)
        _describe(response, file, caching=_caching(repo, revision))
        release_connection()
        return response


def _answer(request: Request, blob: Blob) -> HttpResponseBase:
    tag = etag(blob)
    if _matches(request.headers.get("If-None-Match", ""), tag):
        return HttpResponse(status=304)
    if settings.X_ACCEL_PREFIX and settings.BLOB_STORE == "local":
        # nginx serves the bytes and the ranges; Django has only decided that it may.
        sha256 = blob.sha256
        inner = f"{settings.X_ACCEL_PREFIX}/sha256/{sha256[:2]}/{sha256[2:4]}/{sha256}"
        return HttpResponse(headers={"X-Accel-Redirect": inner})
    span = None
    if request.headers.get("If-Range", tag) == tag:
        span = parse_range(request.headers.get("Range", ""), size_bytes=blob.size_bytes)
    start, end = span or (0, blob.size_bytes)
    headers = {"Content-Length": str(end - start)}
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{blob.size_bytes}"
    status = 200 if span is None else 206
    if request.method == "HEAD":
        return HttpResponse(status=status, headers=headers)
    chunks = storage.get_store().read(blob.sha256, start=start, end=end)
    is_async = isinstance(request._request, ASGIRequest)  # noqa: SLF001  DRF hides it
    body = _read_async(chunks) if is_async else chunks
    return StreamingHttpResponse(body, status=status, headers=headers)


def parse_range(header: str, *, size_bytes: int) -> tuple[int, int] | None:
    """Return [start, end) of a single range, or None where the whole file is the answer.

    Raises:
        UserError: range_invalid.
    """
    match = ONE_RANGE.match(header)
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match[1], match[2]
    if not first:
        start, end = max(size_bytes - int(last), 0), size_bytes
    else:
        start, end = int(first), min(int(last) + 1, size_bytes) if last else size_bytes
        if last and int(last) < start:
            return None
    if start >= size_bytes or start >= end:
        raise UserError("range_invalid", size_bytes=size_bytes)
    return start, end


def etag(blob: Blob) -> str:
    return f'"sha256:{blob.sha256}"'


def _matches(header: str, tag: str) -> bool:
    offered = [item.strip().removeprefix("W/") for item in header.split(",")]
    return tag in offered or "*" in offered


def _caching(repo: Repo, revision: str) -> str:
    if repo.visibility != Repo.Visibility.PUBLIC:
        return "private, no-cache"
    # `latest` and aliases move; numbers and digests never name other bytes.
    is_fixed = catalog.NUMBER.match(revision) or catalog.DIGEST.match(revision)
    return "public, max-age=31536000, immutable" if is_fixed else "public, no-cache"


def _describe(response: HttpResponseBase, file: File, *, caching: str) -> None:
    suffix = "." + file.path.rsplit(".", 1)[-1]
    response.headers["Content-Type"] = CONTENT_TYPES.get(suffix, "text/plain; charset=utf-8")
    response.headers["Content-Disposition"] = f'attachment; filename="{file.path}"'
    response.headers["ETag"] = etag(file.blob)
    response.headers["Accept-Ranges"] = "bytes"
    response.headers["Cache-Control"] = caching
    response.headers["X-Content-Type-Options"] = "nosniff"
    if caching.startswith("private"):
        patch_vary_headers(response, ["Authorization", "Cookie"])


async def _read_async(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    read = sync_to_async(lambda: next(chunks, None), thread_sensitive=False)
    while (chunk := await read()) is not None:
        yield chunk
