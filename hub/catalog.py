"""What there is to find and read."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from uuid import UUID

from django.db.models import Model, OuterRef, Q, QuerySet, Subquery

from deltacome_core.errors import UserError
from hub import access
from hub.models import File, Repo, Revision

Row = TypeVar("Row", bound=Model)
PAGE_ROWS = 50
MAX_QUERY_CHARS = 100
LATEST = "latest"
NUMBER = re.compile(r"\Av([1-9][0-9]{0,8})\Z")
DIGEST = re.compile(r"\Asha256:([0-9a-f]{64})\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[Row]):
    items: Sequence[Row]
    next: str | None


def page_of(rows: "QuerySet[Row, Any]", *, after: str | None, limit: int = PAGE_ROWS) -> Page[Row]:
    """Return the rows that follow the row `after`, the newest first.

    Raises:
        UserError: invalid when the cursor is none of ours.
    """
    if after:
        try:
            rows = rows.filter(pk__lt=UUID(after))
        except ValueError:
            raise UserError("invalid", after=["It is not the `next` of a page."]) from None
    found = list(rows.order_by("-pk")[: limit + 1])
    is_last = len(found) <= limit
    return Page(items=found[:limit], next=None if is_last else str(found[limit - 1].pk))


def list_repos(
    user: access.AnyUser, *, kind: str = "", q: str = "", backbone: str = ""
) -> QuerySet[Repo]:
    """Repos the user may see, narrowed by kind, words and the backbone of their deltas.

    Raises:
        UserError: not_found when the backbone is invisible.
    """
    repos = Repo.objects.visible_to(user).kept().select_related("namespace")
    if kind:
        repos = repos.filter(kind=kind)
    for word in q[:MAX_QUERY_CHARS].split():
        repos = repos.filter(
            Q(name__icontains=word)
            | Q(namespace__name__icontains=word)
            | Q(description__icontains=word)
        )
    if backbone:
        revision_of = access.get_repo(user, *split_name(backbone))
        repos = repos.filter(
            revisions__backbone__repo=revision_of, revisions__state=Revision.State.PUBLISHED
        ).distinct()
    return repos


def list_revisions(repo: Repo) -> QuerySet[Revision]:
    return repo.revisions.downloadable().select_related(
        "repo__namespace", "backbone__repo__namespace"
    )


def latest_revisions(repos: Iterable[Repo]) -> dict[UUID, Revision]:
    """Map each repo that has a published revision to its newest one."""
    newest = Revision.objects.published().filter(repo=OuterRef("repo")).order_by("-number")
    found = Revision.objects.filter(
        repo__in=list(repos), pk=Subquery(newest.values("pk")[:1])
    ).select_related("repo__namespace", "backbone__repo__namespace")
    return {revision.repo_id: revision for revision in found}


def readable_backbones(user: access.AnyUser, revisions: Iterable[Revision]) -> frozenset[UUID]:
    """Repos of these revisions' backbones that the user may see.

    A public delta may have a private backbone: its name is not ours to tell.
    """
    asked = {revision.backbone.repo_id for revision in revisions if revision.backbone}
    return frozenset(
        Repo.objects.visible_to(user).filter(pk__in=asked).values_list("pk", flat=True)
    )


def split_name(name: str) -> tuple[str, str]:
    """Split "namespace/name".

    Raises:
        UserError: not_found.
    """
    namespace, slash, rest = name.partition("/")
    if not slash or not namespace or not rest or "/" in rest:
        raise UserError("not_found")
    return namespace, rest


def find_revision(user: access.AnyUser, name: str) -> Revision:
    """Find "namespace/name" or "namespace/name@revision" among what the user may see.

    Raises:
        UserError: not_found, revision_unknown.
    """
    repo_name, _, revision = name.partition("@")
    return get_revision(access.get_repo(user, *split_name(repo_name)), revision or LATEST)


def get_revision(repo: Repo, name: str) -> Revision:
    """Find a revision by v<number>, latest, sha256:<digest> or alias; yanked ones by exact name.

    Raises:
        UserError: revision_unknown.
    """
    revisions = repo.revisions.select_related("repo__namespace", "backbone__repo__namespace")
    if name == LATEST:
        found = revisions.published().order_by("-number").first()
    elif match := NUMBER.match(name):
        found = revisions.downloadable().filter(number=int(match[1])).first()
    elif match := DIGEST.match(name):
        found = revisions.downloadable().filter(digest=match[1]).first()
    else:
        found = revisions.downloadable().filter(aliases__name=name).first()
    if found is None:
        raise UserError("revision_unknown", repo=str(repo), revision=name[:MAX_QUERY_CHARS])
    return found


def get_file(revision: Revision, path: str) -> File:
    """Find a file of the revision.

    Raises:
        UserError: not_found.
    """
    file = revision.files.filter(path=path).select_related("blob").first()
    if file is None:
        raise UserError("not_found")
    return file
