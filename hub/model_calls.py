"""Requests to models that bring a token, without the threads that every other request takes."""

import asyncio
from contextlib import suppress
from typing import Any, cast

from asgiref.sync import sync_to_async
from django.core.exceptions import RequestAborted
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.exception import response_for_exception
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.middleware.security import SecurityMiddleware
from django.urls import Resolver404, resolve

from hub.middleware import add_headers, refuse_nul

# Every view below these addresses is one of hub.api.inference.
ROUTES = ("/v1/", "/d/")


def is_model_call(scope: dict[str, Any]) -> bool:
    """Whether a request names a model's route and brings a token: no cookie counts."""
    if scope["type"] != "http" or not scope["path"].startswith(ROUTES):
        return False
    if not any(name == b"authorization" for name, _ in scope["headers"]):
        return False
    try:
        resolve(scope["path"])
    except Resolver404:
        return False
    return True


class ModelCalls(ASGIHandler):
    """Django's own handler, less sessions, cookies, messages and a thread for each request.

    None of them matters to a call with a token. For a thousand streams at once they were a thousand
    threads, each with a connection to the database, and a dozen changes of thread a request. What
    guards every page stands here too: known hosts, TLS, the headers of an answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._security = SecurityMiddleware(lambda _request: None)  # type: ignore[arg-type]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            body = await self.read_body(receive)
        except RequestAborted:
            return
        with body:
            request, refusal = self.create_request(scope, body)
            if request is None:
                if refusal is not None:
                    await self.send_response(refusal, send)
                return
            answering = asyncio.create_task(self._answer(request, send))
            leaving = asyncio.create_task(receive())
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            leaving.cancel()
            # Of somebody who left: closing the answer's stream ends it in the engine.
            answering.cancel()
            with suppress(asyncio.CancelledError):
                await answering

    async def _answer(self, request: HttpRequest, send: Any) -> None:
        try:
            response = await self._view(request)
        except Exception as error:  # noqa: BLE001  as Django answers for every view
            answer = sync_to_async(response_for_exception, thread_sensitive=False)
            response = await answer(request, error)
        add_headers(response)
        # It sets headers, which a stream has too.
        self._security.process_response(request, cast("HttpResponse", response))
        await self.send_response(response, send)

    async def _view(self, request: HttpRequest) -> HttpResponseBase:
        request.get_host()
        refusal = refuse_nul(request) or self._security.process_request(request)
        if refusal is not None:
            return refusal
        found = request.resolver_match = resolve(request.path_info)
        response: HttpResponseBase = await found.func(request, *found.args, **found.kwargs)
        return response
