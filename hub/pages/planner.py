"""How many of the registered deltas fit on a card beside their backbone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from django.http import HttpRequest, QueryDict
from django.http.response import HttpResponseBase
from django.views.decorators.http import require_safe

from deltacome_core import memory
from deltacome_core.errors import UserError
from hub import catalog
from hub.access import AnyUser, page_access
from hub.blobs import read_blob
from hub.models import JobStep, Repo, Revision

from . import plots, reads
from .page import crumbs, explain, page

# GB of usual cards, as suggestions; any other number can be typed.
CARDS = (24, 40, 48, 80, 96, 141)
MAX_GPU = 1024
MAX_DELTAS = 10_000
MAX_KV_TOKENS = 100_000_000
# The parts of a card, from the left.
PARTS = ("backbone", "deltas", "leftovers", "cache", "workspace", "free")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The form as it stands in the address; n_deltas None asks for as many as fit."""

    backbone: str
    gpu: int
    n_deltas: int | None
    kv_tokens: int

    @classmethod
    def read(cls, params: QueryDict) -> Self:
        return cls(
            backbone=params.get("backbone", ""),
            gpu=_read_number(params, "gpu", 80, low=1, high=MAX_GPU),
            n_deltas=_read_number(params, "deltas", 0, low=0, high=MAX_DELTAS) or None,
            kv_tokens=_read_number(params, "kv_tokens", 16_384, low=0, high=MAX_KV_TOKENS),
        )

    @property
    def card_bytes(self) -> int:
        return self.gpu * memory.GIGABYTE


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A delta as it lies in the registry; `leftover_bytes` of them are kept exactly."""

    revision: Revision
    n_bytes: int
    leftover_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A forecast beside the card it is for; room None: the deltas take nothing."""

    forecast: memory.Forecast
    card_bytes: int
    room: int | None
    bar: plots.ByteBar | None
    kv_bytes_per_token: int

    @property
    def missing_bytes(self) -> int:
        return max(0, self.forecast.total_bytes - self.card_bytes)


def _read_number(params: QueryDict, name: str, usual: int, *, low: int, high: int) -> int:
    """A number that was typed by hand in the address is cut to what makes sense."""
    try:
        return min(high, max(low, int(params.get(name) or usual)))
    except ValueError:
        return usual


@page_access
@require_safe
def index(request: HttpRequest) -> HttpResponseBase:
    asked = Asked.read(request.GET)
    backbones = reads.list_names(request.user, Repo.Kind.BACKBONE)
    chosen = asked.backbone or next(iter(backbones), "")
    context: dict[str, Any] = {
        "section": "planner",
        "crumbs": crumbs("Planner"),
        "asked": asked,
        "backbones": backbones,
        "chosen": chosen,
        "cards": CARDS,
    }
    try:
        if chosen:
            context |= _plan(request.user, chosen, asked)
    except UserError as error:
        context["error"] = explain(error)
    return page(request, "planner/index.html", context)


def _plan(user: AnyUser, chosen: str, asked: Asked) -> dict[str, Any]:
    backbone = catalog.find_revision(user, chosen)
    if backbone.repo.kind != Repo.Kind.BACKBONE:
        raise UserError("not_found", name=chosen)
    deltas = _list_stored(reads.list_deltas(user, backbone.repo))
    if not deltas:
        return {"deltas": []}
    per_token = memory.kv_bytes_per_token(_read_config(backbone))
    found = memory.forecast(
        [delta.n_bytes for delta in deltas],
        backbone_bytes=memory.served_bytes(backbone.n_params),
        n_deltas=asked.n_deltas or 1,
        kv_bytes=asked.kv_tokens * per_token,
    )
    room = found.count_fitting(asked.card_bytes)
    if asked.n_deltas is None and room:
        found = replace(found, n_deltas=room)
    leftover = sum(d.leftover_bytes for d in deltas) / max(1, sum(d.n_bytes for d in deltas))
    plan = Plan(
        forecast=found,
        card_bytes=asked.card_bytes,
        room=room,
        bar=_draw(found, leftover_share=leftover, card_bytes=asked.card_bytes),
        kv_bytes_per_token=per_token,
    )
    return {"deltas": deltas, "plan": plan}


def _draw(
    found: memory.Forecast, *, leftover_share: float, card_bytes: int
) -> plots.ByteBar | None:
    deltas = found.n_deltas * found.delta_bytes
    leftovers = int(deltas * leftover_share)
    sizes = {
        "backbone": found.backbone_bytes,
        "deltas": deltas - leftovers,
        "leftovers": leftovers,
        "cache": found.kv_bytes,
        "workspace": found.workspace_bytes,
        "free": max(0, card_bytes - found.total_bytes),
    }
    return plots.plot_bytes(sizes, order=PARTS)


def _list_stored(revisions: Sequence[Revision]) -> list[Stored]:
    """The newest revision of each delta with its bytes by kind, as compression reported them."""
    newest = {revision.repo_id: revision for revision in reversed(revisions)}
    steps = JobStep.objects.filter(job__revision__in=newest.values(), name="compress")
    sizes = {
        step.job.revision_id: step.outputs.get("size", {}).get("bytes", {})
        for step in steps.select_related("job")
    }
    stored = [_read_stored(one, sizes.get(one.pk, {})) for one in newest.values()]
    return sorted(stored, key=lambda one: str(one.revision.repo))


def _read_stored(revision: Revision, sizes: Mapping[str, int]) -> Stored:
    total = sum(size for name, size in sizes.items() if name != "header")
    return Stored(
        revision=revision,
        n_bytes=total or revision.size_bytes,
        leftover_bytes=sizes.get("exact", 0),
    )


def _read_config(backbone: Revision) -> Mapping[str, Any]:
    file = backbone.files.select_related("blob").filter(path="config.json").first()
    if file is None:
        raise UserError("not_a_checkpoint", path=str(backbone), reason="it has no config.json")
    config: Mapping[str, Any] = json.loads(read_blob(file.blob))
    return config
