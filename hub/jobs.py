"""The queue of record. A Celery message is only a doorbell that carries a job id.

Every change of a job is a conditional UPDATE on its state and fence (`lease_seq`), and every
clock is the database's: two workers, a paused one or a lost message cannot run a step twice.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import transaction
from django.db.models import DateTimeField, ExpressionWrapper, F, Q
from django.db.models.expressions import Combinable
from django.db.models.functions import Now
from kombu.exceptions import OperationalError

from deltacome_core.errors import Param, UserError
from hub import celery, events, messages
from hub.models import TRANSITIONS, Job, JobStep, LostRace, Revision

log = logging.getLogger(__name__)
State = Job.State

STEPS: dict[str, tuple[str, ...]] = {
    Job.Kind.BACKBONE: ("ingest", "publish"),
    Job.Kind.DELTA: ("ingest", "compress", "verify", "evaluate", "publish"),
}
# A request waits for the broker no longer than this; the sweeper rings again.
SEND_TIMEOUT_S = 1.0


class LeaseLost(Exception):  # noqa: N818  reads as a fact where it is caught
    """The job was taken over, cancelled or finished: stop, and write nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    job_id: UUID
    step: str
    seq: int
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    requeued: int
    failed: int
    rung: int


def from_now(seconds: float) -> Combinable:
    return ExpressionWrapper(Now() + timedelta(seconds=seconds), output_field=DateTimeField())


def enqueue(job: Job) -> None:
    """Ring for the job's step once the surrounding transaction is committed."""
    Job.objects.filter(pk=job.pk).update(last_enqueued_at=Now())
    transaction.on_commit(partial(ring, job.pk, job.step), robust=True)


def ring(job_id: UUID, step: str) -> bool:
    """Send the doorbell; a failure is only a delay, because the sweeper rings again."""
    # Kombu cannot switch off redis-py's retries, which hold a request for 7 s (measured with a
    # refused connection); one ping without retries tells within SEND_TIMEOUT_S.
    if not events.is_reachable():
        log.warning("bell_not_sent", extra={"job_id": str(job_id)})
        return False
    options = {"socket_timeout": SEND_TIMEOUT_S, "socket_connect_timeout": SEND_TIMEOUT_S}
    try:
        with celery.app.connection_for_write(transport_options=options) as connection:
            celery.app.send_task(
                f"workers.tasks.{step}",
                args=[str(job_id)],
                argsrepr="",
                connection=connection,
                retry=False,
            )
    except (OperationalError, OSError) as error:
        log.warning("bell_not_sent", extra={"job_id": str(job_id), "reason": str(error)})
        return False
    return True


# What an earlier attempt met is over once the step has succeeded.
NO_ERROR: dict[str, Any] = {"error_code": "", "error_params": {}, "error_text": ""}


def claim(job_id: UUID | str, *, step: str, owner: str) -> Lease | None:
    """Take the job's current step, or return None when there is nothing to take."""
    job = Job.objects.filter(pk=job_id, step=step).unfinished().first()
    if job is None:
        return None
    is_free = Q(state=State.QUEUED, run_after__lte=Now()) | Q(
        state=State.RUNNING, lease_expires_at__lt=Now()
    )
    try:
        job.move(
            State.RUNNING,
            guard=is_free & Q(step=step, attempt__lt=F("max_attempts")),
            attempt=F("attempt") + 1,
            lease_seq=F("lease_seq") + 1,
            lease_owner=owner,
            lease_expires_at=from_now(settings.LEASE_TTL_S),
            heartbeat_at=Now(),
            progress={},
        )
    except LostRace:
        return None
    announce(job)
    return Lease(job_id=job.pk, step=step, seq=job.lease_seq, attempt=job.attempt)


def heartbeat(lease: Lease, progress: Mapping[str, Any] | None = None) -> bool:
    """Renew the lease. False: fenced or cancelled, kill the child and write nothing."""
    fields: dict[str, Any] = {} if progress is None else {"progress": dict(progress)}
    return bool(
        Job.objects.filter(
            pk=lease.job_id, state=State.RUNNING, lease_seq=lease.seq, step=lease.step
        ).update(heartbeat_at=Now(), lease_expires_at=from_now(settings.LEASE_TTL_S), **fields)
    )


def hold(lease: Lease) -> Job:
    """Lock the job's row inside the caller's transaction.

    Raises:
        LeaseLost: somebody else holds the job now.
    """
    job = (
        Job.objects.select_for_update(of=("self",))
        .filter(pk=lease.job_id, state=State.RUNNING, lease_seq=lease.seq, step=lease.step)
        .first()
    )
    if job is None:
        raise LeaseLost(str(lease.job_id))
    return job


def complete_step(lease: Lease, *, outputs: Mapping[str, Any], seconds: float) -> Job:
    """Record what the step left and ring for the next one, or finish the job.

    Raises:
        LeaseLost: somebody else holds the job now.
    """
    with transaction.atomic():
        job = hold(lease)
        JobStep.objects.update_or_create(
            job=job,
            name=lease.step,
            defaults={"attempt": lease.attempt, "outputs": dict(outputs), "seconds": seconds},
        )
        following = next_step(job)
        if following is None:
            job.move(State.DONE, lease_expires_at=None, **NO_ERROR)
        else:
            _requeue(job, step=following, attempt=0, **NO_ERROR)
            enqueue(job)
    announce(job)
    return job


def next_step(job: Job) -> str | None:
    steps = STEPS[job.kind]
    return dict(pairwise(steps)).get(job.step)


def fail(
    lease: Lease, code: str, params: Mapping[str, Param] | None = None, *, retryable: bool
) -> Job:
    """End the attempt: another one after a pause when that can help, FAILED otherwise.

    Raises:
        LeaseLost: somebody else holds the job now.
    """
    with transaction.atomic():
        job = hold(lease)
        error = _error_fields(code, params or {})
        if retryable and job.attempt < job.max_attempts:
            _requeue(job, run_after=from_now(_backoff_s(job.attempt)), **error)
        else:
            job.move(State.FAILED, lease_expires_at=None, **error)
    announce(job)
    return job


def reject(lease: Lease, code: str, params: Mapping[str, Param] | None = None) -> Job:
    """Stop for good: the fine-tune or its delta did not pass, and the reason is shown first.

    Raises:
        LeaseLost: somebody else holds the job now.
    """
    with transaction.atomic():
        job = hold(lease)
        error = _error_fields(code, params or {})
        job.move(State.REJECTED, lease_expires_at=None, **error)
        Revision.objects.filter(pk=job.revision_id, state=Revision.State.DRAFT).update(
            state=Revision.State.REJECTED, reject_code=code, reject_text=error["error_text"]
        )
    announce(job)
    return job


def cancel(job: Job) -> None:
    """Stop the job now; a running child notices at its next heartbeat.

    Raises:
        UserError: job_finished.
        LostRace: the job moved meanwhile.
    """
    if State.CANCELLED not in TRANSITIONS[State(job.state)]:
        raise UserError("job_finished", state=job.state)
    job.move(State.CANCELLED, lease_seq=F("lease_seq") + 1, lease_expires_at=None)
    announce(job)


def retry(job: Job) -> None:
    """Queue a failed or cancelled job again, at the step where it stopped.

    Raises:
        UserError: job_not_retryable.
        LostRace: the job moved meanwhile.
    """
    if job.state not in {State.FAILED, State.CANCELLED}:
        raise UserError("job_not_retryable", state=job.state)
    with transaction.atomic():
        _requeue(job, attempt=0, finished_at=None, **NO_ERROR)
        enqueue(job)
    announce(job)


def sweep() -> Swept:
    """Heal what crashes and lost messages left; safe to run anywhere, at any time, twice."""
    requeued = failed = rung = 0
    for job in Job.objects.filter(state=State.RUNNING, lease_expires_at__lt=Now()):
        outcome = _end_lost_attempt(job)
        requeued += outcome == State.QUEUED
        failed += outcome == State.FAILED
    stale = Q(last_enqueued_at=None) | Q(last_enqueued_at__lt=from_now(-settings.BELL_RESEND_S))
    # A bell rung before run_after was dropped at the claim, so it counts as never rung.
    stale |= Q(last_enqueued_at__lt=F("run_after"))
    for job in Job.objects.filter(stale, state=State.QUEUED, run_after__lte=Now()):
        still = Job.objects.filter(stale, pk=job.pk, state=State.QUEUED)
        if still.update(last_enqueued_at=Now()):
            rung += ring(job.pk, job.step)
    return Swept(requeued=requeued, failed=failed, rung=rung)


def _end_lost_attempt(job: Job) -> str | None:
    expired = Q(lease_expires_at__lt=Now())
    try:
        if job.attempt < job.max_attempts:
            _requeue(job, guard=expired, run_after=from_now(_backoff_s(job.attempt)))
        else:
            error = _error_fields("worker_lost", {"step": job.step, "attempts": job.attempt})
            job.move(State.FAILED, guard=expired, lease_seq=F("lease_seq") + 1, **error)
    except LostRace:
        return None
    announce(job)
    return job.state


def _requeue(job: Job, *, guard: Q | None = None, **fields: Any) -> None:
    fields.setdefault("run_after", Now())
    job.move(
        State.QUEUED,
        guard=guard,
        lease_seq=F("lease_seq") + 1,
        lease_expires_at=None,
        lease_owner="",
        last_enqueued_at=None,
        **fields,
    )


def _error_fields(code: str, params: Mapping[str, Param]) -> dict[str, Any]:
    return {
        "error_code": code,
        "error_params": dict(params),
        "error_text": messages.render(code, params),
    }


def _backoff_s(attempt: int) -> float:
    return float(settings.RETRY_BACKOFF_S * 2 ** (attempt - 1))


def announce(job: Job) -> None:
    """Tell the people who watch; after commit, and never at the price of the change itself."""
    kind = "done" if job.is_finished else "stage"
    data = describe(job) | {"event": job.last_event.pk}
    transaction.on_commit(partial(events.publish_event, job.pk, kind, data), robust=True)


def describe(job: Job) -> dict[str, str | int]:
    data: dict[str, str | int] = {"state": job.state, "step": job.step, "attempt": job.attempt}
    if job.error_code:
        data |= {"code": job.error_code, "text": job.error_text}
    return data
