"""Answers come from the engine; the hub says who may ask which model, and hands it the files."""

import json
import logging
import weakref
from asyncio import AbstractEventLoop, get_running_loop
from collections.abc import AsyncIterator, Container, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any
from uuid import UUID

import httpx
from django.conf import settings

from deltacome_core.errors import UserError
from hub import access, catalog, finetunes
from hub.models import Repo, Revision, User

log = logging.getLogger(__name__)

MAX_LISTED_MODELS = 1000
ENGINE_RETRY_S = 5
# Loading a large backbone takes minutes. Connecting takes long only while hundreds of others do: an
# engine that is not there refuses at once.
TIMEOUT = httpx.Timeout(600, connect=30)
# What a client acts on; everything else of the engine's answer stays inside.
PASSED_HEADERS = (
    "content-type",
    "retry-after",
    "x-should-retry",
    "cache-control",
    "x-deltacome-canary",
    "x-deltacome-device",
)
UNWANTED_FILES = ("README.md", "evaluation.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a request names: a published revision, or the fine-tune that a delta was made from."""

    revision: Revision
    is_finetune: bool = False

    @property
    def name(self) -> str:
        return str(self.revision) + (finetunes.SUFFIX if self.is_finetune else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The engine's response: `chunks` yields its body and frees the connection at its end."""

    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")


class EngineAwayError(Exception):
    """Nobody listens at ENGINE_URL."""


def find_model(user: User, name: str) -> Model:
    """Find a model among those one may see.

    Names are "namespace/name", "namespace/name@revision" and "@sha256:digest"; with ":finetune"
    at the end they mean the checkpoint that the delta was made from.

    Raises:
        UserError: not_found, revision_unknown, finetune_gone.
    """
    wanted = name.removesuffix(finetunes.SUFFIX)
    revision = _find_revision(user, wanted)
    is_finetune = wanted != name
    if is_finetune and not finetunes.is_held(revision):
        raise UserError("finetune_gone", revision=str(revision))
    return Model(revision=revision, is_finetune=is_finetune)


def _find_revision(user: User, name: str) -> Revision:
    if not name.startswith("@"):
        return catalog.find_revision(user, name)
    match = catalog.DIGEST.match(name[1:])
    visible = Revision.objects.visible_to(user).downloadable().select_related("repo__namespace")
    revision = visible.filter(digest=match[1]).first() if match else None
    if revision is None:
        raise UserError("not_found")
    return revision


def describe_target(model: Model) -> str:
    """Name every file of the model by digest: all that the engine needs to know."""
    revision = model.revision
    if model.is_finetune:
        # A whole checkpoint stands on its own, as a backbone does.
        digest = revision.checkpoint_digest
        target = {
            "backbone": {"digest": digest, "files": finetunes.list_files(revision)},
            "delta": None,
        }
        return json.dumps(target, separators=(",", ":"))
    is_delta = revision.repo.kind == Repo.Kind.DELTA
    backbone = revision.backbone if is_delta else revision
    if backbone is None:
        raise UserError("not_found")
    target = {
        "backbone": _describe(backbone),
        "delta": _describe(revision) if is_delta else None,
    }
    return json.dumps(target, separators=(",", ":"))


def _describe(revision: Revision) -> dict[str, Any]:
    files = revision.files.exclude(path__in=UNWANTED_FILES).values_list("path", "blob_id")
    return {"digest": revision.digest, "files": dict(files)}


def list_models(user: access.AnyUser) -> list[dict[str, Any]]:
    """Describe the latest revision of every repo the user may see, as the OpenAI API does."""
    published = Revision.objects.visible_to(user).published()
    revisions = published.select_related(
        "repo__namespace", "backbone__repo__namespace", "verification"
    )
    latest: dict[object, Revision] = {}
    for revision in revisions.order_by("repo", "-number"):
        latest.setdefault(revision.repo_id, revision)
        if len(latest) >= MAX_LISTED_MODELS:
            break
    readable = catalog.readable_backbones(user, latest.values())
    return [_describe_model(revision, readable) for revision in latest.values()]


def describe_model(user: access.AnyUser, model: Model) -> dict[str, Any]:
    card = _describe_model(model.revision, catalog.readable_backbones(user, [model.revision]))
    if model.is_finetune:
        card |= {"id": model.name, "name": model.name, "root": model.name}
    return card


def _describe_model(revision: Revision, readable: Container[UUID]) -> dict[str, Any]:
    name = str(revision.repo)
    backbone = revision.backbone
    parent = str(backbone.repo) if backbone and backbone.repo_id in readable else None
    card: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": int(revision.created_at.timestamp()),
        "owned_by": revision.repo.namespace.name,
        "name": name,
        "root": f"{name}@{revision.label}",
        "parent": parent,
    }
    if revision.repo.kind == Repo.Kind.DELTA:
        verification = getattr(revision, "verification", None)
        card["x_delta"] = {
            "revision": revision.label,
            "digest": revision.digest,
            "bits_per_param": revision.bits_per_param,
            "ratio": revision.ratio,
            # The grade of its verification; none without a record.
            "verified": verification.grade if verification else None,
        }
    return card


async def ask_engine(
    method: str,
    route: str,
    *,
    body: bytes,
    target: str,
    reference: str | None = None,
    request_id: str = "",
) -> Answer:
    """Forward a request and return as soon as the engine begins to answer.

    Raises:
        EngineAwayError: it cannot be reached, or broke off before it answered.
    """
    client = _client()
    headers = {
        "content-type": "application/json",
        "x-engine-secret": settings.ENGINE_SECRET,
        "x-deltacome-target": target,
        "x-request-id": request_id,
    }
    if reference is not None:
        headers["x-deltacome-reference"] = reference
    request = client.build_request(
        method, f"{settings.ENGINE_URL}{route}", content=body, headers=headers
    )
    try:
        response = await client.send(request, stream=True)
    except httpx.HTTPError as error:
        log.warning("engine_away", extra={"reason": str(error)})
        raise EngineAwayError from error
    return Answer(
        status=response.status_code,
        headers={
            name: response.headers[name] for name in PASSED_HEADERS if name in response.headers
        },
        chunks=_chunks(response),
    )


async def _chunks(response: httpx.Response) -> AsyncIterator[bytes]:
    """Closing this early closes the connection, which ends the answer in the engine."""
    try:
        async for chunk in response.aiter_raw():
            yield chunk
    except httpx.HTTPError as error:
        log.warning("engine_broke_off", extra={"reason": str(error)})
        yield _broken_off(response)
    finally:
        await response.aclose()


def _broken_off(response: httpx.Response) -> bytes:
    message = "The engine broke off in the middle of the answer."
    body = json.dumps({"error": error_body(message, code="engine_away", kind="server_error")})
    is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
    return f"data: {body}\n\n".encode() if is_stream else body.encode()


def error_body(message: str, *, code: str, kind: str, param: str | None = None) -> dict[str, Any]:
    return {"message": message, "type": kind, "param": param, "code": code}


# A pool looks through all its connections for each request: among several of them a thousand
# streams cost what a hundred cost in one.
_N_POOLS = 16
_clients: "weakref.WeakKeyDictionary[AbstractEventLoop, Iterator[httpx.AsyncClient]]" = (
    weakref.WeakKeyDictionary()
)


def _client() -> httpx.AsyncClient:
    """The next pool of connections of the event loop; connections cannot move between loops."""
    loop = get_running_loop()
    if loop not in _clients:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=4)
        # Reading the certificates takes longer than all the rest, and is enough once.
        certificates = httpx.create_ssl_context(trust_env=False)
        pools = [
            httpx.AsyncClient(timeout=TIMEOUT, limits=limits, trust_env=False, verify=certificates)
            for _ in range(_N_POOLS)
        ]
        _clients[loop] = cycle(pools)
    return next(_clients[loop])
