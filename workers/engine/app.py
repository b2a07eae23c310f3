"""The HTTP face of the engine. It trusts nobody but the hub, which shares its secret."""

import asyncio
import hmac
import json
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from deltacome_core.errors import UserError
from workers.engine import answers, compare, streams, tokenizers
from workers.engine.answers import Run
from workers.engine.config import EngineConfig
from workers.engine.errors import ApiError, bad_request, broken
from workers.engine.model import LoadedModel
from workers.engine.openai import (
    parse_chat,
    parse_compare,
    parse_completion,
    parse_detokenize,
    parse_tokenize,
)
from workers.engine.residency import Residency
from workers.engine.responses import Answer
from workers.engine.service import Engine, open_engine
from workers.engine.snapshots import Target, parse_target
from workers.engine.status import PUBLIC_ROUTES, show_status
from workers.engine.tokenizers import Words
from workers.fetch import BlobReader

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 * 2**20
SECRET_HEADER = "x-engine-secret"  # noqa: S105 (the name of the header)
TARGET_HEADER = "x-deltacome-target"
REFERENCE_HEADER = "x-deltacome-reference"
CANARY_HEADER = "x-deltacome-canary"
# So that a page can say what its speeds are worth.
DEVICE_HEADER = "x-deltacome-device"
REQUEST_ID_HEADER = "x-request-id"

Handler = Callable[[Request], Awaitable[Response]]


def create_app(config: EngineConfig, blobs: BlobReader) -> Starlette:
    engine = open_engine(config, blobs)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    app = Starlette(
        routes=[
            *PUBLIC_ROUTES,
            Route("/status", guarded(show_status)),
            Route("/v1/models", guarded(list_models)),
            Route("/v1/chat/completions", guarded(chat_completions), methods=["POST"]),
            Route("/v1/completions", guarded(completions), methods=["POST"]),
            Route("/v1/compare", guarded(compare_models), methods=["POST"]),
            Route("/v1/tokenizer_info", guarded(tokenizer_info)),
            Route("/v1/tokenize", guarded(tokenize), methods=["POST"]),
            Route("/v1/detokenize", guarded(detokenize), methods=["POST"]),
        ],
        exception_handlers={HTTPException: handle_http_error},
        lifespan=lifespan,
    )
    app.state.engine = engine
    return app


def guarded(handler: Handler) -> Handler:
    """Refuse strangers, and turn every failure into the one error shape."""

    async def handle(request: Request) -> Response:
        try:
            _check_secret(request)
            return await handler(request)
        except ApiError as error:
            return error_response(error)
        except UserError as error:
            facts = {"code": error.code, "request_id": _request_id(request)}
            log.warning("model_not_served", extra=facts)
            return error_response(broken(str(error), code=error.code))
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception:
            log.exception("request_failed", extra={"request_id": _request_id(request)})
            return error_response(broken("The engine failed on this request.", code="internal"))

    return handle


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=dict(error.headers()))


async def handle_http_error(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return error_response(ApiError(status, "not_found", "There is no such route."))


def _request_id(request: Request) -> str:
    """The hub's name for the request, which its client was told."""
    return request.headers.get(REQUEST_ID_HEADER, "")


def _check_secret(request: Request) -> None:
    engine: Engine = request.app.state.engine
    sent = request.headers.get(SECRET_HEADER, "")
    if not hmac.compare_digest(sent.encode(), engine.config.secret.encode()):
        raise ApiError(
            401, "invalid_engine_secret", "Only the hub may ask.", kind="authentication_error"
        )


async def list_models(request: Request) -> Response:
    """What is in memory now; names live in the hub, so the ids are content keys."""
    engine: Engine = request.app.state.engine
    data = [
        {"id": delta or backbone, "object": "model", "created": 0, "owned_by": "deltacome"}
        for backbone, delta in engine.residency.resident_keys()
    ]
    return JSONResponse({"object": "list", "data": data})


async def chat_completions(request: Request) -> Response:
    asked = parse_chat(await _read_json(request))
    async with _open_run(request, asked.model, "chatcmpl") as run:
        await answers.start_chat(run, asked)
        if asked.delivery.stream:
            return _stream(run, streams.stream_chat(run, asked))
        return await _whole(request, run, answers.collect_chat(run, asked))


async def completions(request: Request) -> Response:
    asked = parse_completion(await _read_json(request))
    async with _open_run(request, asked.model, "cmpl") as run:
        await answers.start_completion(run, asked)
        if asked.delivery.stream:
            return _stream(run, streams.stream_completion(run, asked))
        return await _whole(request, run, answers.collect_completion(run, asked))


async def compare_models(request: Request) -> Response:
    asked = parse_compare(await _read_json(request))
    async with (
        _open_run(request, asked.reference, "cmp", header=REFERENCE_HEADER) as reference,
        _open_run(request, asked.model, "cmp") as run,
    ):
        return await _whole(request, run, compare.compare(run, reference, asked))


async def tokenizer_info(request: Request) -> Response:
    return JSONResponse(tokenizers.describe(await _get_words(request)))


async def tokenize(request: Request) -> Response:
    asked = parse_tokenize(await _read_json(request))
    words = await _get_words(request)
    return JSONResponse(await asyncio.to_thread(tokenizers.tokenize, words, asked))


async def detokenize(request: Request) -> Response:
    tokens = parse_detokenize(await _read_json(request))
    words = await _get_words(request)
    return JSONResponse(await asyncio.to_thread(tokenizers.detokenize, words, tokens))


async def _get_words(request: Request) -> Words:
    engine: Engine = request.app.state.engine
    target = parse_target(request.headers.get(TARGET_HEADER))
    return await asyncio.to_thread(engine.tokenizers.get, target)


async def _read_json(request: Request) -> Any:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, "request_too_large", "The request body is too large.")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise bad_request("The request body is not JSON.", None, code="invalid_json") from error


@asynccontextmanager
async def _open_run(
    request: Request, model: str, prefix: str, *, header: str = TARGET_HEADER
) -> AsyncIterator[Run]:
    """Bring the model into memory and keep it there until the answer has ended."""
    engine: Engine = request.app.state.engine
    target = parse_target(request.headers.get(header))
    run = await _load_run(
        engine,
        target,
        Answer.begin(f"{prefix}-{uuid.uuid4().hex}", model=model, fingerprint=target.fingerprint),
    )
    try:
        yield run
    finally:
        # A streamed answer goes on after its handler returned; its stream closes the run.
        if not run.streams:
            run.close()


async def _load_run(engine: Engine, target: Target, answer: Answer) -> Run:
    loading = asyncio.ensure_future(asyncio.to_thread(engine.residency.acquire, target))
    try:
        model = await asyncio.shield(loading)
    except asyncio.CancelledError:
        # The thread goes on; when it is done nobody uses what it loaded.
        loading.add_done_callback(partial(_release_unused, engine.residency, target))
        raise
    return Run(
        answer=answer,
        model=model,
        config=engine.config,
        scheduler=engine.scheduler,
        release=lambda: engine.residency.release(target),
    )


def _release_unused(
    residency: Residency, target: Target, loading: asyncio.Future[LoadedModel]
) -> None:
    if not loading.cancelled() and loading.exception() is None:
        residency.release(target)


async def _whole(request: Request, run: Run, answer: Awaitable[Any]) -> Response:
    content = await _unless_gone(request, answer)
    return JSONResponse(content, headers=_describe_run(run))


def _describe_run(run: Run) -> dict[str, str]:
    return {
        CANARY_HEADER: run.model.canary.header,
        DEVICE_HEADER: run.config.device.partition(":")[0],
    }


def _stream(run: Run, chunks: AsyncIterator[str]) -> Response:
    run.streams = True
    headers = {
        "Cache-Control": "no-cache",
        "X-Accel-Buffering": "no",
        **_describe_run(run),
    }
    return _RunResponse(run, _with_error(chunks), headers=headers)


class _RunResponse(StreamingResponse):
    """Closes its run however the stream ends, even when the client left before the first byte."""

    media_type = "text/event-stream"

    def __init__(self, run: Run, chunks: AsyncIterator[str], *, headers: Mapping[str, str]) -> None:
        super().__init__(chunks, headers=headers)
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._run.close()


async def _with_error(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """A failure after the first byte can only be told inside the stream."""
    try:
        async for chunk in chunks:
            yield chunk
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n"


async def _unless_gone(request: Request, answer: Awaitable[Any]) -> Any:
    """Wait for the answer, but not for a client that hung up."""
    working = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        leaving.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
