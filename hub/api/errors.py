"""One shape for every error: {code, message, do, fields}."""

import logging
import uuid
from collections.abc import Mapping
from typing import Any

from django.core.exceptions import PermissionDenied
from django.http import Http404, JsonResponse
from rest_framework import exceptions
from rest_framework.response import Response

from deltacome_core.errors import UserError
from hub import messages
from hub.models import LostRace

log = logging.getLogger(__name__)


def error_body(code: str, params: Mapping[str, Any]) -> dict[str, Any]:
    message = messages.explain(code, params)
    text = f"{message.title}. {message.what}"
    return {"code": code, "message": text, "do": message.do, "fields": dict(params)}


def error_response(error: UserError) -> JsonResponse:
    """Answer for a view that is not a DRF view."""
    body = error_body(error.code, error.params)
    return JsonResponse(body, status=messages.http_status(error.code))


def handle_exception(error: Exception, context: Mapping[str, Any]) -> Response:
    code, params = _describe(error, context)
    status = messages.http_status(code)
    response = Response(error_body(code, params), status=status)
    if status == 401:  # noqa: PLR2004  Unauthorized must say how to sign in
        response.headers["WWW-Authenticate"] = "Bearer"
    if code == "range_invalid":
        response.headers["Content-Range"] = f"bytes */{params['size_bytes']}"
    return response


# Errors of the framework whose text is always the same.
_CODES: tuple[tuple[tuple[type[Exception], ...], str], ...] = (
    ((LostRace,), "job_moved"),
    ((exceptions.NotAuthenticated, exceptions.AuthenticationFailed), "not_signed_in"),
    ((exceptions.PermissionDenied, PermissionDenied), "permission_denied"),
    ((exceptions.NotFound, Http404), "not_found"),
)


def _describe(error: Exception, context: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    if isinstance(error, UserError):
        return error.code, error.params
    if isinstance(error, exceptions.ValidationError):
        detail = error.detail
        return "invalid", detail if isinstance(detail, dict) else {"non_field_errors": detail}
    if isinstance(error, exceptions.ParseError | exceptions.UnsupportedMediaType):
        return "invalid", {"non_field_errors": [f"The body is not JSON: {error.detail}."]}
    if isinstance(error, exceptions.MethodNotAllowed):
        return "method_not_allowed", {"method": str(context["request"].method)}
    for kinds, code in _CODES:
        if isinstance(error, kinds):
            return code, {}
    reference = uuid.uuid4().hex[:12]
    log.error("request_failed", exc_info=error, extra={"reference": reference})
    return "internal", {"reference": reference}
