import json
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from django.conf import settings
from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "hub.settings")

Scope = dict[str, Any]
Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# The largest body of any route: one part, or one safetensors header of 8 MiB and its length.
MAX_HEADER_BYTES = 8 * 2**20 + 8


def limit_body(app: App, *, max_bytes: int) -> App:
    """Refuse a larger body before Django spools it to disk."""

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > max_bytes:
            await _refuse(send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            # A chunked body has no declared length: stop reading when it grows too long.
            return {"type": "http.disconnect"} if received > max_bytes else message

        await app(scope, counted, send)
        if received > max_bytes:
            # Django took it for a client that went away, and has not answered.
            await _refuse(send)

    return limited


async def _refuse(send: Send) -> None:
    body = json.dumps(error_body("body_too_large", {})).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})


_pages = get_asgi_application()
# Views and models can be imported once that has loaded the apps.
from hub.api.errors import error_body  # noqa: E402
from hub.model_calls import ModelCalls, is_model_call  # noqa: E402

_model_calls = ModelCalls()


async def route(scope: Scope, receive: Receive, send: Send) -> None:
    """Send calls of models with a token their short way, and everything else through Django."""
    await (_model_calls if is_model_call(scope) else _pages)(scope, receive, send)


application = limit_body(route, max_bytes=max(settings.UPLOAD_PART_BYTES, MAX_HEADER_BYTES) + 1)
