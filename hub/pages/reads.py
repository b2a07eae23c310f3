"""What the lists show, a fixed number of queries each; nothing leaves without `visible_to`."""

from collections.abc import Sequence
from dataclasses import dataclass

from django.db.models import Count, Sum

from hub import catalog, finetunes
from hub.access import ROLES, AnyUser, Right
from hub.models import Job, Membership, Repo, Revision, User, Verification

MAX_LISTED_REPOS = 200
MAX_LISTED_DELTAS = 50
MAX_RUNNING_JOBS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A repo with its latest revision; the backbone's name only if the reader may see it."""

    repo: Repo
    revision: Revision | None
    verification: Verification | None
    backbone: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    n_deltas: int
    size_bytes: int
    source_size_bytes: int

    @property
    def saved_bytes(self) -> int:
        return self.source_size_bytes - self.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A model to ask; `label` is the revision that its name means now."""

    name: str
    label: str
    has_finetune: bool


def list_entries(user: AnyUser, repos: Sequence[Repo]) -> list[Entry]:
    latest = catalog.latest_revisions(repos)
    readable = catalog.readable_backbones(user, latest.values())
    checked = {
        found.revision_id: found
        for found in Verification.objects.filter(revision__in=latest.values())
    }
    entries = []
    for repo in repos:
        revision = latest.get(repo.pk)
        backbone = revision.backbone if revision else None
        entries.append(
            Entry(
                repo=repo,
                revision=revision,
                verification=checked.get(revision.pk) if revision else None,
                backbone=str(backbone.repo) if backbone and backbone.repo_id in readable else "",
            )
        )
    return entries


def visible_backbone(user: AnyUser, revision: Revision) -> Revision | None:
    """A public delta may have a private backbone: its name is not ours to tell."""
    return (
        Revision.objects.visible_to(user)
        .filter(deltas=revision)
        .select_related("repo__namespace")
        .first()
    )


def sum_saved(user: AnyUser, *, backbone: Repo | None = None) -> Saved:
    """Add up what the visible deltas weigh and what their fine-tunes would."""
    deltas = Revision.objects.visible_to(user).published().filter(repo__kind=Repo.Kind.DELTA)
    if backbone is not None:
        deltas = deltas.filter(backbone__repo=backbone)
    total = deltas.aggregate(
        n=Count("pk"), size=Sum("size_bytes", default=0), source=Sum("source_size_bytes", default=0)
    )
    return Saved(n_deltas=total["n"], size_bytes=total["size"], source_size_bytes=total["source"])


def list_deltas(user: AnyUser, backbone: Repo) -> list[Revision]:
    """The newest published deltas of a backbone, one row a revision."""
    return list(
        Revision.objects.visible_to(user)
        .published()
        .filter(backbone__repo=backbone)
        .select_related("repo__namespace", "verification")
        .order_by("-id")[:MAX_LISTED_DELTAS]
    )


def list_names(user: AnyUser, kind: str) -> list[str]:
    """Repos of this kind with a published revision, by name."""
    return [str(repo) for repo in _list_published(user, kind)]


def list_choices(user: AnyUser, kind: str) -> list[Choice]:
    """Models of this kind that can be asked, by name."""
    repos = _list_published(user, kind)
    latest = catalog.latest_revisions(repos)
    held = finetunes.find_held(latest.values())
    return [
        Choice(name=str(revision.repo), label=revision.label, has_finetune=revision.pk in held)
        for revision in (latest[repo.pk] for repo in repos)
    ]


def _list_published(user: AnyUser, kind: str) -> list[Repo]:
    repos = Repo.objects.visible_to(user).filter(
        kind=kind, revisions__state=Revision.State.PUBLISHED
    )
    ordered = repos.select_related("namespace").distinct().order_by("namespace__name", "name")
    return list(ordered[:MAX_LISTED_REPOS])


def list_running_jobs(user: AnyUser) -> list[Job]:
    return list(
        Job.objects.visible_to(user)
        .unfinished()
        .select_related("revision__repo__namespace", "owner")
        .order_by("-id")[:MAX_RUNNING_JOBS]
    )


def list_writable_namespaces(user: User) -> list[str]:
    """The user's own namespace first."""
    memberships = Membership.objects.filter(user=user, role__in=ROLES[Right.WRITE])
    names = memberships.order_by("-namespace__kind", "namespace__name")
    return list(names.values_list("namespace__name", flat=True))
