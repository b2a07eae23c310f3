from dataclasses import dataclass
from typing import Self

from django.http import HttpRequest, QueryDict
from django.http.response import HttpResponseBase
from django.views.decorators.http import require_safe
from django.views.decorators.vary import vary_on_headers

from deltacome_core.errors import UserError
from hub import catalog
from hub.access import page_access
from hub.models import Repo

from . import reads
from .page import page


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """The filters as they stand in the address."""

    q: str
    kind: str
    backbone: str
    after: str

    @classmethod
    def read(cls, params: QueryDict) -> Self:
        kind = params.get("kind", "")
        return cls(
            q=params.get("q", "").strip(),
            kind=kind if kind in Repo.Kind.values else "",
            backbone=params.get("backbone", ""),
            after=params.get("after", ""),
        )

    @property
    def is_narrowed(self) -> bool:
        return bool(self.q or self.kind or self.backbone or self.after)


@page_access
@require_safe
@vary_on_headers("HX-Request")
def index(request: HttpRequest) -> HttpResponseBase:
    query = Query.read(request.GET)
    try:
        repos = catalog.list_repos(
            request.user, kind=query.kind, q=query.q, backbone=query.backbone
        )
        found = catalog.page_of(repos, after=query.after)
    except UserError as error:
        # An address with a cursor that is none of ours, or with a backbone nobody may see.
        if error.code not in {"invalid", "not_found"}:
            raise
        found = catalog.Page(items=[], next=None)
    context = {
        "section": "explore",
        "query": query,
        "repos": reads.list_entries(request.user, found.items),
        "next_query": _next_query(request, found.next),
    }
    if request.headers.get("HX-Request"):
        return page(request, "explore/results.html", context)
    context |= {
        "backbones": reads.list_names(request.user, Repo.Kind.BACKBONE),
        "totals": reads.sum_saved(request.user),
        "running_jobs": reads.list_running_jobs(request.user),
    }
    return page(request, "explore/index.html", context)


def _next_query(request: HttpRequest, after: str | None) -> str:
    if after is None:
        return ""
    params = request.GET.copy()
    params["after"] = after
    return params.urlencode()
