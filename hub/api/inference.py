"""The OpenAI-compatible routes: `model` is a repo of the hub, the key is a token of the hub.

They stand twice: under /v1, where the body names the model, and under /d/<namespace>/<name>/v1,
where the address does, for clients that ask for a tokenizer without saying whose.

Errors have OpenAI's shape here and nowhere else, because that is what its clients can read.
"""

import json
import time
import uuid
from asyncio import get_running_loop
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

from asgiref.sync import sync_to_async
from django.core.exceptions import RequestDataTooBig
from django.core.handlers.asgi import ASGIRequest
from django.db import close_old_connections
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.urls import path
from django.views.decorators.csrf import csrf_exempt
from rest_framework.authentication import CSRFCheck

from deltacome_core.errors import UserError
from hub import inference, messages
from hub.api.auth import find_token
from hub.api.json_body import parse_json
from hub.inference import Model
from hub.models import User

View = Callable[..., Coroutine[Any, Any, HttpResponseBase]]
_R = TypeVar("_R")
# Threads that ask the database for all requests here. Django's own way is a thread, and with it a
# connection, for each request as long as it lasts: a thousand of them for a thousand streams.
_THREADS = ThreadPoolExecutor(4, thread_name_prefix="hub-ask")


async def ask(request: HttpRequest, work: Callable[..., _R], *args: object) -> _R:
    """Await the answer of work that asks the database."""
    if not isinstance(request, ASGIRequest):
        # By WSGI the request has a thread already, and its view runs there.
        return await sync_to_async(work)(*args)

    def run() -> _R:
        try:
            return work(*args)
        finally:
            close_old_connections()

    return await get_running_loop().run_in_executor(_THREADS, run)


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
        self.body = inference.error_body(message, code=code, kind=kind, param=param)


def openai_route(*methods: str) -> Callable[[View], View]:
    """Name the caller, and turn every refusal into OpenAI's shape."""

    def decorate(view: View) -> View:
        @csrf_exempt
        @wraps(view)
        async def handle(request: HttpRequest, **captured: str) -> HttpResponseBase:
            started = time.monotonic()
            request_id = f"req_{uuid.uuid4().hex}"
            try:
                _check_method(request, methods)
                user = await ask(request, _authenticate, request)
                response = await view(
                    Call(request=request, user=user, request_id=request_id, **captured)
                )
            except Refusal as refusal:
                response = JsonResponse({"error": refusal.body}, status=refusal.status)
                if refusal.retry_after_s is not None:
                    response["Retry-After"] = str(refusal.retry_after_s)
                    response["X-Should-Retry"] = "true"
            response["X-Request-Id"] = request_id
            response["OpenAI-Processing-Ms"] = str(round(1000 * (time.monotonic() - started)))
            return response

        return handle

    return decorate


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A model that the caller may ask, and its files as the engine is told of them."""

    model: Model
    target: str


def _find_whole(user: User, name: str) -> Found:
    model = inference.find_model(user, name)
    return Found(model=model, target=inference.describe_target(model))


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request: who asks, and what its address names."""

    request: HttpRequest
    user: User
    request_id: str
    namespace: str = ""
    repo: str = ""
    wanted: str = ""
    rest: str = ""

    @property
    def place(self) -> str:
        """The model of the address, or nothing under /v1."""
        return f"{self.namespace}/{self.repo}" if self.namespace else ""

    def read_json(self) -> dict[str, Any]:
        try:
            body = parse_json(self.request.body)
        except RequestDataTooBig:
            raise Refusal(413, "request_too_large", "The request body is too large.") from None
        except ValueError as error:
            message = f"The request body is not JSON: {error}."
            raise Refusal(400, "invalid_json", message) from None
        if not isinstance(body, dict):
            raise Refusal(400, "invalid_json", "The request body must be a JSON object.")
        return body

    async def find_named(self, name: object, *, param: str = "model") -> Found:
        """Find the model that a field of the request names."""
        if not isinstance(name, str) or not name:
            message = f"{param} must name a backbone or a delta."
            raise Refusal(400, "invalid_value", message, param=param)
        try:
            return await ask(self.request, _find_whole, self.user, name)
        except UserError as error:
            text = f"The model {name[:200]!r} does not exist or you may not see it."
            if error.code == "finetune_gone":
                text = messages.explain(error.code, error.params).what
            raise Refusal(404, "model_not_found", text, param=param) from None

    async def find_model(self, name: object) -> Found:
        """Find the model of the address; a body that names another one is a mistake."""
        if not self.place:
            return await self.find_named(name)
        found = await self.find_named(self.place)
        if name is not None and name != "":
            other = await self.find_named(name)
            if other.model.revision.repo_id != found.model.revision.repo_id:
                message = f"This address answers for {self.place!r} only."
                raise Refusal(400, "model_mismatch", message, param="model")
        return found


def _check_method(request: HttpRequest, allowed: tuple[str, ...]) -> None:
    if request.method not in allowed:
        raise Refusal(405, "method_not_allowed", f"Use {' or '.join(allowed)}.")


@openai_route("GET", "POST")
async def nothing(call: Call) -> HttpResponseBase:
    """What no route matches still answers in OpenAI's shape."""
    asked = f"{call.request.method} {call.request.path}"
    raise Refusal(404, "unknown_url", f"Unknown request URL: {asked}.")


@openai_route("GET")
async def models(call: Call) -> HttpResponseBase:
    if call.place:
        found = await call.find_named(call.place)
        data = [await ask(call.request, inference.describe_model, call.user, found.model)]
    else:
        data = await ask(call.request, inference.list_models, call.user)
    return JsonResponse({"object": "list", "data": data})


@openai_route("GET")
async def model(call: Call) -> HttpResponseBase:
    found = await call.find_named(call.wanted)
    card = await ask(call.request, inference.describe_model, call.user, found.model)
    return JsonResponse(card)


def forwarded(method: str, route: str) -> View:
    """Make a view whose body, with the model named, is the engine's to judge and to answer."""

    @openai_route(method)
    async def view(call: Call) -> HttpResponseBase:
        if method == "GET":
            found = await call.find_model(call.request.GET.get("model"))
            return await _forward(call, method, route, found)
        body = call.read_json()
        found = await call.find_model(body.get("model"))
        content = call.request.body
        if not body.get("model"):
            content = json.dumps(body | {"model": call.place}).encode()
        return await _forward(call, method, route, found, content=content)

    return view


@openai_route("POST")
async def compare(call: Call) -> HttpResponseBase:
    """Two models along one text: the second is named by `reference`."""
    body = call.read_json()
    found = await call.find_model(body.get("model"))
    reference = await call.find_named(body.get("reference"), param="reference")
    content = json.dumps(
        body | {"model": found.model.name, "reference": reference.model.name}
    ).encode()
    return await _forward(call, "POST", "/v1/compare", found, content=content, reference=reference)


async def _forward(
    call: Call,
    method: str,
    route: str,
    found: Found,
    *,
    content: bytes = b"",
    reference: Found | None = None,
) -> HttpResponseBase:
    try:
        answer = await inference.ask_engine(
            method,
            route,
            body=content,
            target=found.target,
            reference=None if reference is None else reference.target,
            request_id=call.request_id,
        )
    except inference.EngineAwayError:
        raise Refusal(
            503,
            "engine_away",
            "The engine is not running; try again in a moment.",
            kind="server_error",
            retry_after_s=inference.ENGINE_RETRY_S,
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
    revision = found.model.revision
    response["X-Delta-Revision"] = f"{revision.label} sha256:{revision.digest}"
    return response


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


# Without /v1 too under /d/…, because evaluation harnesses cut "/v1/completions" off the address.
tokenizer_urls = [
    path("tokenizer_info", forwarded("GET", "/v1/tokenizer_info"), name="inference-tokenizer"),
    path("tokenize", forwarded("POST", "/v1/tokenize"), name="inference-tokenize"),
    path("detokenize", forwarded("POST", "/v1/detokenize"), name="inference-detokenize"),
]
urlpatterns = [
    path("models", models, name="inference-models"),
    path("models/<path:wanted>", model, name="inference-model"),
    path("chat/completions", forwarded("POST", "/v1/chat/completions"), name="inference-chat"),
    path("completions", forwarded("POST", "/v1/completions"), name="inference-completions"),
    path("compare", compare, name="inference-compare"),
    *tokenizer_urls,
    path("<path:rest>", nothing, name="inference-nothing"),
]
