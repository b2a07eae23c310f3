"""One attempt of one step: claim the job, keep the lease, do the work, move the job on."""

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

from django.db import InterfaceError, OperationalError, connection

from deltacome_core.errors import UserError
from hub import events, jobs, uploads
from hub.jobs import Lease, LeaseLost
from hub.models import Job
from hub.publishing import publish_revision
from workers import stages
from workers.config import read_config
from workers.lease import RETRY_PAUSE_S, LeaseKeeper
from workers.stages import Attempt, Rejected
from workers.supervise import ChildDied, ChildHandle
from workers.workspace import open_workspace, remove_workspace

log = logging.getLogger(__name__)

# Trying again can help where the world changed, never where the upload is wrong.
RETRYABLE_CODES = frozenset(
    {"disk_full", "out_of_memory", "device_memory_short", "file_digest_mismatch", "file_missing"}
)
EVENT_INTERVAL_S = 0.2

Result = TypeVar("Result")


def run_step(step: str, job_id: str) -> None:
    """Do the step if the job waits for it; a late or doubled message ends here without effect."""
    lease = jobs.claim(job_id, step=step, owner=f"{socket.gethostname()}:{os.getpid()}")
    if lease is None:
        log.info("nothing_to_claim", extra={"job_id": job_id, "step": step})
        return
    child = ChildHandle()
    with LeaseKeeper(lease, on_lost=child.end, timeout_s=read_config().step_timeout_s) as keeper:
        try:
            _work(lease, keeper, child)
        except LeaseLost:
            log.warning("lease_lost", extra={"job_id": job_id, "step": step})
        except Exception as error:  # noqa: BLE001 (whatever it is, the job must hear of it)
            _settle(keeper, lease, error)
    _clean_up(lease.job_id)


def _work(lease: Lease, keeper: LeaseKeeper, child: ChildHandle) -> None:
    started = time.monotonic()
    job = Job.objects.select_related("upload", "owner", "revision__repo__namespace").get(
        pk=lease.job_id
    )
    attempt = Attempt(
        job=job,
        lease=lease,
        workspace=open_workspace(lease.job_id),
        child=child,
        listen=_listener(lease, keeper),
        persist=partial(_persist, keeper),
    )
    if lease.step == "publish":
        publication = _persist(keeper, lambda: stages.publish(attempt))
        seconds = time.monotonic() - started
        _persist(keeper, lambda: publish_revision(lease, publication, seconds=seconds))
        # What is published has rows of its own; the sweeper does this where we cannot.
        uploads.finish_sources(job.upload)
    else:
        outputs = stages.STAGES[lease.step](attempt)
        seconds = time.monotonic() - started
        _persist(keeper, lambda: jobs.complete_step(lease, outputs=outputs, seconds=seconds))


def _settle(keeper: LeaseKeeper, lease: Lease, error: Exception) -> None:
    """Write the failure down, unless the job is in other hands by now."""
    if keeper.timed_out:
        error = UserError("step_timeout", step=lease.step)
    elif keeper.lost:
        log.warning("lease_lost", extra={"job_id": str(lease.job_id), "step": lease.step})
        return
    try:
        _persist(keeper, lambda: _record(lease, error))
    except LeaseLost:
        log.warning("lease_lost", extra={"job_id": str(lease.job_id), "step": lease.step})


def _record(lease: Lease, error: Exception) -> Job:
    if isinstance(error, Rejected):
        return jobs.reject(lease, error.code, error.params)
    if isinstance(error, UserError):
        retryable = error.code in RETRYABLE_CODES
        return jobs.fail(lease, error.code, error.params, retryable=retryable)
    if isinstance(error, ChildDied):
        events.publish_event(lease.job_id, "log", {"text": error.log_tail})
        facts = {"job_id": str(lease.job_id), "exit": error.returncode, "log": error.log_tail}
        log.error("child_died", extra=facts)
        params: dict[str, str | int] = {"step": lease.step, "exit": _describe(error.returncode)}
        return jobs.fail(lease, "step_crashed", params, retryable=True)
    log.error("step_failed", extra={"job_id": str(lease.job_id)}, exc_info=error)
    reference = f"{lease.job_id}/{lease.step}/{lease.attempt}"
    return jobs.fail(lease, "internal", {"reference": reference}, retryable=True)


def _describe(returncode: int) -> str:
    return f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"


def _persist(keeper: LeaseKeeper, write: Callable[[], Result]) -> Result:
    """Write to the database, waiting for one that is away as long as the lease can be ours."""
    while True:
        try:
            return write()
        except (OperationalError, InterfaceError) as error:
            connection.close()
            if keeper.lost:
                raise
            log.warning("database_away", extra={"reason": str(error)})
            time.sleep(RETRY_PAUSE_S)


def _listener(lease: Lease, keeper: LeaseKeeper) -> Callable[[str, Mapping[str, Any]], None]:
    """Pass on what the child says; progress that comes faster than anyone can read is thinned."""
    sent_at = 0.0

    def listen(kind: str, data: Mapping[str, Any]) -> None:
        nonlocal sent_at
        if kind == "progress":
            keeper.note(data)
            is_last = data.get("done") == data.get("total")
            if time.monotonic() - sent_at < EVENT_INTERVAL_S and not is_last:
                return
            sent_at = time.monotonic()
        events.publish_event(lease.job_id, kind, {"step": lease.step, **data})

    return listen


def _clean_up(job_id: UUID) -> None:
    """A job that is over for good needs its scratch folder no more; a failed one may be retried."""
    over = (Job.State.DONE, Job.State.REJECTED, Job.State.CANCELLED)
    if Job.objects.filter(pk=job_id, state__in=over).exists():
        remove_workspace(job_id)
