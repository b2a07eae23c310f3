"""The OpenAI-compatible routes: `model` is a repo of the hub, the key is a token of the hub.

Errors have OpenAI's shape here and nowhere else, because that is what its clients can read.
"""

import json
import uuid
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

from asgiref.sync import sync_to_async
from django.core.exceptions import RequestDataTooBig
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.urls import path
from django.views.decorators.csrf import csrf_exempt
from rest_framework.authentication import CSRFCheck

from deltacome_core.errors import UserError
from hub import playground
from hub.api.auth import find_token
from hub.models import User

View = Callable[..., Coroutine[Any, Any, HttpResponseBase]]


class Refusal(Exception):  # noqa: N818  what it is: an answer, not a mistake
    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.body = playground.error_body(message, code=code, kind=kind, param=param)


def openai_route(*methods: str) -> Callable[[View], View]:
    """Name the caller, and turn every refusal into OpenAI's shape."""

    def decorate(view: View) -> View:
        @csrf_exempt
        @wraps(view)
        async def handle(request: HttpRequest, **captured: str) -> HttpResponseBase:
            try:
                _check_method(request, methods)
                user = await sync_to_async(_authenticate)(request)
                response = await view(request, user, **captured)
            except Refusal as refusal:
                response = JsonResponse({"error": refusal.body}, status=refusal.status)
                if refusal.retry_after_s is not None:
                    response["Retry-After"] = str(refusal.retry_after_s)
                    response["X-Should-Retry"] = "true"
            response["X-Request-Id"] = f"req_{uuid.uuid4().hex}"
            return response

        return handle

    return decorate


def _check_method(request: HttpRequest, allowed: tuple[str, ...]) -> None:
    if request.method not in allowed:
        raise Refusal(405, "method_not_allowed", f"Use {' or '.join(allowed)}.")


@openai_route("GET", "POST")
async def nothing(request: HttpRequest, _user: User, **_path: str) -> HttpResponseBase:
    """What no route matches still answers in OpenAI's shape."""
    raise Refusal(404, "unknown_url", f"Unknown request URL: {request.method} {request.path}.")


@openai_route("GET")
async def models(_request: HttpRequest, user: User) -> HttpResponseBase:
    data = await sync_to_async(playground.list_models)(user)
    return JsonResponse({"object": "list", "data": data})


@openai_route("GET")
async def model(_request: HttpRequest, user: User, name: str) -> HttpResponseBase:
    revision = await _find_model(user, name)
    return JsonResponse(await sync_to_async(playground.describe_model)(user, revision))


@openai_route("POST")
async def chat_completions(request: HttpRequest, user: User) -> HttpResponseBase:
    return await _forward(request, user, "/v1/chat/completions")


@openai_route("POST")
async def completions(request: HttpRequest, user: User) -> HttpResponseBase:
    return await _forward(request, user, "/v1/completions")


async def _forward(request: HttpRequest, user: User, route: str) -> HttpResponseBase:
    revision = await _find_model(user, _read_model(request))
    target = await sync_to_async(playground.describe_target)(revision)
    try:
        answer = await playground.ask_engine(route, body=request.body, target=target)
    except playground.EngineAwayError:
        raise Refusal(
            503,
            "engine_away",
            "The engine is not running; try again in a moment.",
            kind="server_error",
            retry_after_s=playground.ENGINE_RETRY_S,
        ) from None
    response: HttpResponseBase
    if answer.is_stream:
        response = StreamingHttpResponse(answer.chunks, status=answer.status)
    else:
        body = b"".join([chunk async for chunk in answer.chunks])
        response = HttpResponse(body, status=answer.status)
    for header, value in answer.headers.items():
        response[header] = value
    response["X-Accel-Buffering"] = "no"
    response["X-Delta-Revision"] = f"{revision.label} sha256:{revision.digest}"
    return response


def _read_model(request: HttpRequest) -> str:
    try:
        body: Any = json.loads(request.body)
    except RequestDataTooBig:
        raise Refusal(413, "request_too_large", "The request body is too large.") from None
    except (ValueError, RecursionError):
        raise Refusal(400, "invalid_json", "The request body is not JSON.") from None
    name = body.get("model") if isinstance(body, dict) else None
    if not isinstance(name, str) or not name:
        raise Refusal(400, "invalid_value", "model must name a backbone or a delta.", param="model")
    return name


@sync_to_async
def _find_model(user: User, name: str) -> Any:
    try:
        return playground.find_model(user, name)
    except UserError:
        raise Refusal(
            404,
            "model_not_found",
            f"The model {name[:200]!r} does not exist or you may not see it.",
            param="model",
        ) from None


def _authenticate(request: HttpRequest) -> User:
    """A token needs no CSRF check; a session does, because browsers send cookies unasked."""
    try:
        token = find_token(request)
    except UserError:
        raise _stranger("The token is not valid.") from None
    if token is not None:
        return token.user
    if not isinstance(request.user, User) or not request.user.is_active:
        raise _stranger("Sign in, or send a token of the hub as the API key.")
    check = CSRFCheck(lambda _request: HttpResponse())
    check.process_request(request)
    if check.process_view(request, lambda _request: HttpResponse(), (), {}) is not None:
        raise Refusal(403, "csrf_failed", "The CSRF token is missing.", kind="permission_error")
    return request.user


def _stranger(message: str) -> Refusal:
    return Refusal(401, "invalid_api_key", message, kind="authentication_error")


urlpatterns = [
    path("models", models, name="inference-models"),
    path("models/<path:name>", model, name="inference-model"),
    path("chat/completions", chat_completions, name="inference-chat"),
    path("completions", completions, name="inference-completions"),
    path("<path:rest>", nothing, name="inference-nothing"),
]
