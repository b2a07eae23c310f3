from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.shortcuts import redirect
from django.urls import reverse
from django.views.decorators.http import require_POST, require_safe

from deltacome_core.errors import UserError
from hub import access, catalog, publishing, storage, votes
from hub.access import page_access
from hub.models import Evaluation, Job, JobStep, Repo, Revision, Verification

from . import plots, reads
from .checks import GRADES, list_checks, list_errors
from .page import crumbs, current_user, flash_error, flash_good, page, repo_url
from .snippets import list_file_snippets, list_snippets

CARD_NAME = "README.md"
MAX_CARD_BYTES = 256 * 1024
MAX_WORST = 12
MAX_REASON_CHARS = 500
TAB_LABELS = {
    "overview": "Overview",
    "files": "Files",
    "verification": "Verification",
    "evaluations": "Evaluations",
}
DELTA_TABS = tuple(TAB_LABELS)
BACKBONE_TABS = ("overview", "files")
PAGE_NAMES = {
    "overview": "repo",
    "files": "repo-files",
    "verification": "repo-verification",
    "evaluations": "repo-evaluations",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tab:
    name: str
    label: str
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRow:
    path: str
    size_bytes: int
    sha256: str
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One task's accuracy of all three models, for the tile."""

    task: str
    backbone: float
    finetune: float
    delta: float


def _show(request: HttpRequest, namespace: str, name: str, tab: str) -> HttpResponseBase:
    repo = access.get_repo(request.user, namespace, name)
    rev = request.GET.get("rev", "")
    try:
        revision = catalog.get_revision(repo, rev or "latest")
    except UserError:
        if rev or tab != "overview":
            raise
        return page(request, "repos/base.html", _unpublished_context(request, repo))
    context = _common_context(request, repo, revision, tab=tab, rev=rev)
    context |= TAB_CONTEXTS[tab](request, revision)
    return page(request, _template(repo, tab), context)


def _template(repo: Repo, tab: str) -> str:
    return f"repos/{repo.kind if tab == 'overview' else tab}.html"


def _trail(repo: Repo, tab: str) -> list[Any]:
    namespace = (repo.namespace.name, f"{reverse('explore')}?q={repo.namespace.name}")
    if tab == "overview":
        return crumbs(namespace, repo.name)
    return crumbs(namespace, (repo.name, repo_url(repo)), TAB_LABELS[tab])


def _unpublished_context(request: HttpRequest, repo: Repo) -> dict[str, Any]:
    jobs = Job.objects.visible_to(request.user).filter(revision__repo=repo)
    return {
        "section": "explore",
        "crumbs": _trail(repo, "overview"),
        "repo": repo,
        "tab": "overview",
        "revision": None,
        "revisions": repo.revisions.downloadable().order_by("-number"),
        "jobs": jobs.select_related("revision__repo__namespace", "owner").order_by("-id"),
    }


def _common_context(
    request: HttpRequest, repo: Repo, revision: Revision, *, tab: str, rev: str
) -> dict[str, Any]:
    suffix = f"?rev={rev}" if rev else ""
    model = f"{repo}@{rev}" if rev else str(repo)
    names = DELTA_TABS if repo.kind == Repo.Kind.DELTA else BACKBONE_TABS
    urls = {name: repo_url(repo, PAGE_NAMES[name]) + suffix for name in names}
    visible_jobs = Job.objects.visible_to(request.user)
    return {
        "section": "explore",
        "crumbs": _trail(repo, tab),
        "repo": repo,
        "revision": revision,
        "rev": rev,
        "revisions": repo.revisions.downloadable().order_by("-number"),
        "tab": tab,
        "tabs": [Tab(name=name, label=TAB_LABELS[name], url=urls[name]) for name in names],
        "urls": urls
        | {
            "playground": f"{reverse('playground')}?d={quote(model)}",
            "yank": repo_url(repo, "repo-yank"),
            "visibility": repo_url(repo, "repo-visibility"),
        },
        "can_write": access.may(request.user, repo, access.Right.WRITE),
        "job": visible_jobs.filter(revision=revision).first(),
    }


def _overview_context(request: HttpRequest, revision: Revision) -> dict[str, Any]:
    context: dict[str, Any] = {
        "card_text": _read_card(revision),
        "snippets": list_snippets(
            revision,
            origin=request.build_absolute_uri("/").rstrip("/"),
            backbone=reads.visible_backbone(request.user, revision),
        ),
    }
    if revision.repo.kind == Repo.Kind.BACKBONE:
        deltas = reads.list_deltas(request.user, revision.repo)
        return context | {
            "deltas": deltas,
            "more_deltas": len(deltas) == reads.MAX_LISTED_DELTAS,
            "saved": reads.sum_saved(request.user, backbone=revision.repo),
        }
    scores = list(revision.evaluations.all())
    return (
        context
        | _verification_context(request, revision)
        | {
            "backbone": reads.visible_backbone(request.user, revision),
            "quality": plots.plot_quality(scores),
            "tallies": votes.list_tallies(request.user, revision),
            "headline": _find_headline(scores),
        }
    )


def _read_card(revision: Revision) -> str:
    file = revision.files.filter(path=CARD_NAME).select_related("blob").first()
    if file is None:
        return ""
    raw = bytearray()
    for chunk in storage.get_store().read(file.blob_id):
        raw += chunk
        if len(raw) >= MAX_CARD_BYTES:
            break
    return bytes(raw[:MAX_CARD_BYTES]).decode(errors="replace")


def _find_headline(scores: list[Evaluation]) -> Headline | None:
    by_task: dict[str, dict[str, float]] = {}
    for score in scores:
        by_task.setdefault(score.task, {})[score.subject] = score.accuracy
    for task, found in sorted(by_task.items()):
        if len(found) == len(Evaluation.Subject):
            return Headline(
                task=task,
                backbone=found[Evaluation.Subject.BACKBONE],
                finetune=found[Evaluation.Subject.FINETUNE],
                delta=found[Evaluation.Subject.DELTA],
            )
    return None


def _files_context(request: HttpRequest, revision: Revision) -> dict[str, Any]:
    base = f"/api/v1/repos/{revision.repo}/revisions/{revision.label}/files/"
    files = [
        FileRow(
            path=file.path,
            size_bytes=file.blob.size_bytes,
            sha256=file.blob_id,
            url=base + quote(file.path),
        )
        for file in revision.files.select_related("blob").order_by("path")
    ]
    measured = JobStep.objects.filter(job__revision=revision, name="compress").first()
    sizes = measured.outputs.get("size", {}).get("bytes", {}) if measured else {}
    return {
        "files": files,
        "total_bytes": sum(file.size_bytes for file in files),
        "byte_bar": plots.plot_bytes(sizes),
        "snippets": list_file_snippets(
            revision, origin=request.build_absolute_uri("/").rstrip("/")
        ),
    }


def _verification_context(_request: HttpRequest, revision: Revision) -> dict[str, Any]:
    verification = Verification.objects.filter(revision=revision).first()
    report = verification.report if verification else {}
    checks = list_checks(report)
    errors = list_errors(report)
    return {
        "verification": verification,
        "checks": checks,
        "passed_checks": sum(check.ok for check in checks),
        "failed_checks": sum(not check.ok for check in checks),
        "grades": GRADES,
        "error_map": plots.plot_error_map({item.name: item.error for item in errors}),
        "worst": errors[:MAX_WORST],
    }


def _evaluations_context(request: HttpRequest, revision: Revision) -> dict[str, Any]:
    return {
        "quality": plots.plot_quality(list(revision.evaluations.all())),
        "tallies": votes.list_tallies(request.user, revision),
    }


TAB_CONTEXTS: dict[str, Callable[[HttpRequest, Revision], dict[str, Any]]] = {
    "overview": _overview_context,
    "files": _files_context,
    "verification": _verification_context,
    "evaluations": _evaluations_context,
}


@page_access
@require_safe
def overview(request: HttpRequest, namespace: str, name: str) -> HttpResponseBase:
    return _show(request, namespace, name, "overview")


@page_access
@require_safe
def files(request: HttpRequest, namespace: str, name: str) -> HttpResponseBase:
    return _show(request, namespace, name, "files")


@page_access
@require_safe
def verification(request: HttpRequest, namespace: str, name: str) -> HttpResponseBase:
    return _show(request, namespace, name, "verification")


@page_access
@require_safe
def evaluations(request: HttpRequest, namespace: str, name: str) -> HttpResponseBase:
    return _show(request, namespace, name, "evaluations")


@page_access
@require_POST
def yank(request: HttpRequest, namespace: str, name: str) -> HttpResponseBase:
    repo = access.get_repo(request.user, namespace, name)
    access.require(request.user, repo, access.Right.WRITE)
    revision = catalog.get_revision(repo, request.POST.get("rev", ""))
    reason = request.POST.get("reason", "").strip()[:MAX_REASON_CHARS]
    try:
        publishing.yank_revision(revision, current_user(request), reason=reason)
    except UserError as error:
        flash_error(request, error)
    else:
        flash_good(request, f"{revision.label} is yanked.")
    return redirect(f"{repo_url(repo)}?rev={revision.label}")


@page_access
@require_POST
def visibility(request: HttpRequest, namespace: str, name: str) -> HttpResponseBase:
    repo = access.get_repo(request.user, namespace, name)
    access.require(request.user, repo, access.Right.ADMIN)
    wanted = request.POST.get("visibility", "")
    if wanted not in Repo.Visibility.values:
        raise UserError("invalid", visibility=["It is public or private."])
    publishing.update_repo(repo, current_user(request), visibility=wanted)
    flash_good(request, f"{repo} is {wanted} now.")
    return redirect("repo", repo.namespace.name, repo.name)
