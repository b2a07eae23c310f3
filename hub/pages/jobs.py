from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.shortcuts import redirect
from django.views.decorators.http import require_POST, require_safe

from deltacome_core.errors import UserError
from hub import access, catalog, jobs, messages
from hub.access import page_access, signed_in
from hub.models import Job, JobStep, LostRace

from . import reads
from .checks import failed_check
from .page import crumbs, flash_error, page, repo_url

DONE = "done"
WAITING = "waiting"
# What the bytes and their recipe are refused for: the same happens to them again.
_OF_THE_BYTES = frozenset(
    {
        "activations_not_finite",
        "architecture_unknown",
        "backbone_mismatch",
        "backbone_unrelated",
        "budget_impossible",
        "calibration_too_short",
        "checkpoint_quantised",
        "config_unsafe",
        "model_not_runnable",
        "nan_weights",
        "texts_invalid",
        "tokenizer_missing",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    name: str
    state: str
    seconds: float | None
    attempt: int
    max_attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    done: int
    total: int
    text: str


def list_steps(job: Job) -> list[StepView]:
    """Every step of the job with its state, finished ones with their duration."""
    left = {step.name: step for step in job.steps.all()}
    return [_view_step(job, name, left.get(name)) for name in jobs.STEPS[job.kind]]


def _view_step(job: Job, name: str, left: JobStep | None) -> StepView:
    state = DONE if left is not None else WAITING
    if left is None and name == job.step:
        state = job.state.lower()
    return StepView(
        name=name,
        state=state,
        seconds=None if left is None else left.seconds,
        attempt=job.attempt if name == job.step else 0,
        max_attempts=job.max_attempts,
    )


def read_progress(progress: Mapping[str, Any]) -> Progress | None:
    done, total = progress.get("done"), progress.get("total")
    if not isinstance(done, int) or not isinstance(total, int) or total < 1:
        return None
    known = {"done", "total", "step"}
    detail = [_describe(name, value) for name, value in progress.items() if name not in known]
    return Progress(done=done, total=total, text=" · ".join([f"{done} of {total}", *detail]))


def _describe(name: str, value: object) -> str:
    shown = f"{value:.3g}" if isinstance(value, float) else str(value)
    return f"{shown} s" if name == "seconds" else f"{name.replace('_', ' ')} {shown}"


def _context(request: HttpRequest, job: Job) -> dict[str, Any]:
    events = list(job.events.order_by("-id"))
    return {
        "section": "jobs",
        "crumbs": crumbs(("Jobs", "/jobs"), str(job.pk)[:8]),
        "job": job,
        "repo": job.repo,
        "repo_url": repo_url(job.repo),
        "backbone": reads.visible_backbone(request.user, job.revision),
        "steps": list_steps(job),
        "progress": read_progress(job.progress) if job.state == Job.State.RUNNING else None,
        "error": messages.explain(job.error_code, job.error_params) if job.error_code else None,
        "failing": failed_check(job.error_params) if job.state == Job.State.REJECTED else [],
        "events": events,
        "n_ends": sum(event.new not in {Job.State.QUEUED, Job.State.RUNNING} for event in events),
        "can_write": access.may(request.user, job.repo, access.Right.WRITE),
        "can_cancel": not job.is_finished,
        "can_retry": job.state in {Job.State.FAILED, Job.State.CANCELLED},
        "fails_again": job.error_code in _OF_THE_BYTES,
    }


@signed_in
@page_access
@require_safe
def index(request: HttpRequest) -> HttpResponseBase:
    rows = Job.objects.visible_to(request.user).select_related("revision__repo__namespace", "owner")
    found = catalog.page_of(rows, after=request.GET.get("after"))
    context = {
        "section": "jobs",
        "crumbs": crumbs("Jobs"),
        "jobs": found.items,
        "next_after": found.next,
    }
    return page(request, "jobs/index.html", context)


@signed_in
@page_access
@require_safe
def detail(request: HttpRequest, job_id: UUID) -> HttpResponseBase:
    return page(
        request, "jobs/detail.html", _context(request, access.get_job(request.user, job_id))
    )


@signed_in
@page_access
@require_safe
def state(request: HttpRequest, job_id: UUID) -> HttpResponseBase:
    """The parts of the job's page that change while it runs."""
    context = _context(request, access.get_job(request.user, job_id))
    return page(request, "jobs/parts.html", context | {"is_part": True})


@signed_in
@page_access
@require_POST
def cancel(request: HttpRequest, job_id: UUID) -> HttpResponseBase:
    return _move(request, job_id, jobs.cancel)


@signed_in
@page_access
@require_POST
def retry(request: HttpRequest, job_id: UUID) -> HttpResponseBase:
    return _move(request, job_id, jobs.retry)


def _move(request: HttpRequest, job_id: UUID, verb: Callable[[Job], None]) -> HttpResponseBase:
    job = access.get_job(request.user, job_id)
    access.require(request.user, job.repo, access.Right.WRITE)
    try:
        verb(job)
    except LostRace:
        flash_error(request, UserError("job_finished", state=job.state))
    except UserError as error:
        flash_error(request, error)
    return redirect("job", job_id)
