import base64
import binascii
import re
from collections.abc import Iterator
from typing import IO
from uuid import UUID

from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from deltacome_core.errors import UserError
from deltacome_core.safetensors_file import LENGTH_BYTES, MAX_HEADER_BYTES
from hub import access, uploads
from hub.api.auth import SignedIn, current_user
from hub.api.serializers import (
    HeaderCheckedSerializer,
    PartSerializer,
    SealedSerializer,
    UploadSerializer,
    UploadSpecSerializer,
)
from hub.api.views import errors
from hub.storage import CHUNK_BYTES
from hub.upload_opening import open_upload

SHA256_DIGEST = re.compile(r"(?:\A|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):\s*(?:,|\Z)")
MAX_DIGEST_CHARS = 400
MAX_KEY_CHARS = 100
BINARY = {"application/octet-stream": OpenApiTypes.BINARY}
KEY = OpenApiParameter(
    "Idempotency-Key",
    str,
    OpenApiParameter.HEADER,
    description="The same key and body give the same upload.",
)
DIGEST = OpenApiParameter(
    "Content-Digest",
    str,
    OpenApiParameter.HEADER,
    required=True,
    description="RFC 9530: sha-256=:<base64>:",
)


class Uploads(APIView):
    permission_classes = [SignedIn]

    @extend_schema(
        operation_id="open_upload",
        parameters=[KEY],
        request=UploadSpecSerializer,
        responses={201: UploadSerializer} | errors(409, 413, 422, 429, 507),
    )
    def post(self, request: Request) -> Response:
        asked = UploadSpecSerializer(data=request.data)
        asked.is_valid(raise_exception=True)
        key = request.headers.get("Idempotency-Key")
        if key is not None and not 0 < len(key) <= MAX_KEY_CHARS:
            reason = f"It has 1 to {MAX_KEY_CHARS} characters."
            raise UserError("invalid", **{"Idempotency-Key": [reason]})
        upload = open_upload(current_user(request), asked.spec(), idempotency_key=key)
        return Response(UploadSerializer(upload).data, status=201)


class UploadDetail(APIView):
    permission_classes = [SignedIn]

    @extend_schema(operation_id="get_upload", responses={200: UploadSerializer} | errors())
    def get(self, request: Request, upload_id: UUID) -> Response:
        return Response(UploadSerializer(access.get_upload(request.user, upload_id)).data)

    @extend_schema(operation_id="abort_upload", responses={204: None} | errors(409))
    def delete(self, request: Request, upload_id: UUID) -> Response:
        uploads.abort_upload(access.get_upload(request.user, upload_id))
        return Response(status=204)


class UploadHeader(APIView):
    permission_classes = [SignedIn]
    parser_classes = []

    @extend_schema(
        operation_id="put_header",
        request=BINARY,
        responses={200: HeaderCheckedSerializer} | errors(409, 413, 422),
    )
    def put(self, request: Request, upload_id: UUID, index: int) -> Response:
        upload = access.get_upload(request.user, upload_id)
        limit = MAX_HEADER_BYTES + LENGTH_BYTES
        raw = _body(request).read(limit + 1)
        if len(raw) > limit:
            path = uploads.find_file(upload, index).path
            raise UserError("header_too_large", file=path, found=len(raw), limit=limit)
        file = uploads.put_header(upload, index, raw)
        found = {
            "index": file.index,
            "path": file.path,
            "header_ok": file.header_ok,
            "backbone": str(upload.backbone) if upload.backbone else None,
            "layout": upload.layout,
        }
        return Response(HeaderCheckedSerializer(found).data)


class UploadPart(APIView):
    permission_classes = [SignedIn]
    parser_classes = []

    @extend_schema(
        operation_id="put_part",
        parameters=[DIGEST],
        request=BINARY,
        responses={200: PartSerializer} | errors(409, 413, 422, 507),
    )
    def put(self, request: Request, upload_id: UUID, index: int, number: int) -> Response:
        upload = access.get_upload(request.user, upload_id)
        sha256 = parse_digest(request.headers.get("Content-Digest", ""))
        chunks = _chunks(_body(request))
        part = uploads.store_part(upload, index, number, chunks=chunks, sha256=sha256)
        return Response(PartSerializer(part).data)


class UploadSeal(APIView):
    permission_classes = [SignedIn]

    @extend_schema(
        operation_id="seal_upload", request=None, responses={202: SealedSerializer} | errors(409)
    )
    def post(self, request: Request, upload_id: UUID) -> Response:
        job = uploads.seal_upload(access.get_upload(request.user, upload_id))
        location = {"Location": f"/api/v1/jobs/{job.pk}"}
        return Response(SealedSerializer({"job": job}).data, status=202, headers=location)


def parse_digest(header: str) -> str:
    """Return the hex sha256 of a Content-Digest header.

    Raises:
        UserError: content_digest_missing.
    """
    match = SHA256_DIGEST.search(header[:MAX_DIGEST_CHARS])
    if match is None:
        raise UserError("content_digest_missing")
    try:
        return base64.b64decode(match[1], validate=True).hex()
    except binascii.Error:
        raise UserError("content_digest_missing") from None


def _body(request: Request) -> IO[bytes]:
    return request._request  # type: ignore[return-value]  # noqa: SLF001  it reads like a file


def _chunks(body: IO[bytes]) -> Iterator[bytes]:
    while chunk := body.read(CHUNK_BYTES):
        yield chunk
