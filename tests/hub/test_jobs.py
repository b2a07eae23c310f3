import itertools
import threading
import time
from datetime import timedelta

import factories
import pytest
from django.db import connection
from django.db.models.functions import Now

from deltacome_core.errors import InternalError, UserError
from hub import jobs
from hub.models import TRANSITIONS, Job, JobEvent, LostRace, Revision

pytestmark = pytest.mark.django_db
State = Job.State


@pytest.fixture
def rung(monkeypatch):
    """Record the bells instead of sending them."""
    bells = []
    monkeypatch.setattr(jobs, "ring", lambda job_id, step: bells.append((job_id, step)) or True)
    return bells


@pytest.fixture
def job(acme):
    return factories.make_job(factories.make_repo(acme))


def take(job):
    job.refresh_from_db()
    return jobs.claim(job.pk, step=job.step, owner="worker-1")


def expire(job):
    Job.objects.filter(pk=job.pk).update(lease_expires_at=jobs.from_now(-1))


@pytest.mark.parametrize(("old", "new"), list(itertools.product(State, State)))
def test_each_pair_of_states_moves_or_is_refused_as_the_table_says(acme, old, new):
    job = factories.make_job(factories.make_repo(acme), state=old)
    if new in TRANSITIONS[old]:
        job.move(new)
        assert (job.state, job.events.get().old, job.events.get().new) == (new, old, new)
    else:
        with pytest.raises(InternalError):
            job.move(new)
        assert Job.objects.get(pk=job.pk).state == old


def test_a_finished_job_knows_when_it_ended(job):
    job.move(State.CANCELLED)
    assert job.finished_at is not None


def test_a_stale_view_of_a_job_cannot_move_it(job):
    stale = Job.objects.get(pk=job.pk)
    take(job)
    with pytest.raises(LostRace):
        stale.move(State.CANCELLED)
    assert JobEvent.objects.filter(job=job).count() == 1


def test_a_claim_raises_attempt_and_fence_and_starts_the_lease(job):
    lease = take(job)
    job.refresh_from_db()
    assert (lease.step, lease.seq, lease.attempt) == ("ingest", 1, 1)
    assert (job.state, job.lease_owner, job.attempt) == (State.RUNNING, "worker-1", 1)
    assert job.lease_expires_at > job.heartbeat_at


def test_a_second_claim_gets_nothing(job):
    assert take(job) is not None
    assert take(job) is None


def test_a_claim_of_another_step_gets_nothing(job):
    assert jobs.claim(job.pk, step="compress", owner="w") is None


def test_a_claim_before_run_after_gets_nothing(job):
    Job.objects.filter(pk=job.pk).update(run_after=jobs.from_now(60))
    assert take(job) is None


@pytest.mark.parametrize("state", [State.DONE, State.FAILED, State.CANCELLED, State.REJECTED])
def test_a_finished_job_cannot_be_claimed(acme, state):
    assert take(factories.make_job(factories.make_repo(acme), state=state)) is None


def test_an_expired_lease_is_taken_over_with_a_higher_fence(job):
    first = take(job)
    expire(job)
    second = take(job)
    assert (second.seq, second.attempt) == (first.seq + 1, 2)


def test_a_live_lease_is_not_taken_over(job):
    take(job)
    assert take(job) is None
    job.refresh_from_db()
    assert job.lease_seq == 1


def test_a_heartbeat_extends_the_lease_and_stores_progress(job):
    lease = take(job)
    Job.objects.filter(pk=job.pk).update(lease_expires_at=jobs.from_now(1))
    assert jobs.heartbeat(lease, {"layer": 3})
    job.refresh_from_db()
    assert job.progress == {"layer": 3}
    assert job.lease_expires_at - job.heartbeat_at > timedelta(seconds=20)


def test_a_fenced_worker_can_do_nothing(job, rung):
    old = take(job)
    expire(job)
    new = take(job)
    assert not jobs.heartbeat(old)
    for late in (
        lambda: jobs.complete_step(old, outputs={}, seconds=1.0),
        lambda: jobs.fail(old, "worker_lost", retryable=True),
        lambda: jobs.reject(old, "nan_weights"),
    ):
        with pytest.raises(jobs.LeaseLost):
            late()
    assert jobs.heartbeat(new)


@pytest.mark.parametrize("kind", ["backbone", "delta"])
def test_a_job_walks_through_its_steps_to_the_end(
    acme, kind, rung, django_capture_on_commit_callbacks
):
    job = factories.make_job(factories.make_repo(acme, kind=kind))
    for step in jobs.STEPS[kind]:
        with django_capture_on_commit_callbacks(execute=True):
            job = jobs.complete_step(take(job), outputs={"of": step}, seconds=1.5)
    assert job.state == State.DONE
    assert [step for _, step in rung] == list(jobs.STEPS[kind][1:])
    assert {row.name: row.outputs["of"] for row in job.steps.all()} == {
        step: step for step in jobs.STEPS[kind]
    }


def test_each_step_has_its_own_attempts(job, rung):
    take(job)
    expire(job)
    jobs.complete_step(take(job), outputs={}, seconds=1.0)
    assert take(job).attempt == 1


def test_a_retryable_failure_waits_and_tries_again(job, settings):
    failed = jobs.fail(take(job), "device_unavailable", {"device": "cuda"}, retryable=True)
    assert (failed.state, failed.error_code) == (State.QUEUED, "device_unavailable")
    assert "cuda" in failed.error_text
    assert failed.run_after > Job.objects.annotate(now=Now()).get(pk=job.pk).now


def test_the_last_retryable_failure_is_final(job):
    Job.objects.filter(pk=job.pk).update(attempt=2)
    failed = jobs.fail(take(job), "device_unavailable", {"device": "cuda"}, retryable=True)
    assert failed.state == State.FAILED


def test_a_permanent_failure_is_final_at_once(job):
    assert jobs.fail(take(job), "nan_weights", retryable=False).state == State.FAILED


def test_a_rejected_job_rejects_its_draft_with_the_reason(job):
    rejected = jobs.reject(take(job), "nan_weights", {"tensors": ["model.norm.weight"]})
    revision = Revision.objects.get(pk=job.revision_id)
    assert (rejected.state, revision.state) == (State.REJECTED, Revision.State.REJECTED)
    assert revision.reject_code == "nan_weights"
    assert "model.norm.weight" in revision.reject_text


def test_a_cancelled_job_fences_its_worker(job):
    lease = take(job)
    jobs.cancel(Job.objects.get(pk=job.pk))
    assert not jobs.heartbeat(lease)
    with pytest.raises(jobs.LeaseLost):
        jobs.complete_step(lease, outputs={}, seconds=1.0)


def test_a_finished_job_cannot_be_cancelled(acme):
    job = factories.make_job(factories.make_repo(acme), state=State.DONE)
    with pytest.raises(UserError) as caught:
        jobs.cancel(job)
    assert caught.value.code == "job_finished"


def test_a_retry_starts_the_failed_step_with_fresh_attempts(
    job, rung, django_capture_on_commit_callbacks
):
    failed = jobs.fail(take(job), "nan_weights", retryable=False)
    with django_capture_on_commit_callbacks(execute=True):
        jobs.retry(failed)
    assert (failed.state, failed.attempt, failed.error_code) == (State.QUEUED, 0, "")
    assert failed.finished_at is None
    assert rung == [(job.pk, "ingest")]
    assert take(job) is not None


@pytest.mark.parametrize("state", [State.QUEUED, State.RUNNING, State.DONE, State.REJECTED])
def test_only_failed_and_cancelled_jobs_are_retried(acme, state):
    job = factories.make_job(factories.make_repo(acme), state=state)
    with pytest.raises(UserError) as caught:
        jobs.retry(job)
    assert caught.value.code == "job_not_retryable"


def test_the_sweeper_requeues_a_lost_worker_with_a_pause(job, rung):
    lease = take(job)
    expire(job)
    assert jobs.sweep().requeued == 1
    job.refresh_from_db()
    assert (job.state, job.attempt) == (State.QUEUED, 1)
    assert not jobs.heartbeat(lease)
    assert rung == []


def test_the_sweeper_gives_up_after_the_last_attempt(job, rung):
    Job.objects.filter(pk=job.pk).update(attempt=2)
    take(job)
    expire(job)
    assert jobs.sweep().failed == 1
    job.refresh_from_db()
    assert (job.state, job.error_code) == (State.FAILED, "worker_lost")
    assert "3 times" in job.error_text


def test_the_sweeper_leaves_a_live_lease_alone(job, rung):
    take(job)
    assert jobs.sweep() == jobs.Swept(requeued=0, failed=0, rung=0)


def test_the_sweeper_rings_again_for_a_lost_bell_and_only_once(job, rung):
    Job.objects.filter(pk=job.pk).update(last_enqueued_at=jobs.from_now(-31))
    assert (jobs.sweep().rung, jobs.sweep().rung) == (1, 0)
    assert rung == [(job.pk, "ingest")]


def test_the_sweeper_does_not_ring_for_a_fresh_bell(job, rung):
    Job.objects.filter(pk=job.pk).update(
        run_after=jobs.from_now(-2), last_enqueued_at=jobs.from_now(-1)
    )
    assert jobs.sweep().rung == 0


def test_the_sweeper_rings_when_the_pause_after_a_failure_is_over(job, rung):
    jobs.fail(take(job), "device_unavailable", {"device": "cuda"}, retryable=True)
    assert jobs.sweep().rung == 0
    Job.objects.filter(pk=job.pk).update(run_after=jobs.from_now(-1))
    assert jobs.sweep().rung == 1


def race(n_threads, work):
    """Run `work` at once in threads and return what came back."""
    barrier, results = threading.Barrier(n_threads), []

    def run(index):
        try:
            barrier.wait(timeout=20)
            results.append(work(index))
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == n_threads
    return results


@pytest.mark.django_db(transaction=True)
def test_of_many_claims_at_once_exactly_one_wins(acme, redis_server):
    job = factories.make_job(factories.make_repo(acme))
    leases = race(8, lambda index: jobs.claim(job.pk, step="ingest", owner=f"worker-{index}"))
    won = [lease for lease in leases if lease is not None]
    job.refresh_from_db()
    assert len(won) == 1
    assert (job.attempt, job.lease_seq) == (1, won[0].seq)


@pytest.mark.django_db(transaction=True)
def test_of_many_takeovers_of_an_expired_lease_exactly_one_wins(acme, redis_server):
    job = factories.make_job(factories.make_repo(acme))
    take(job)
    expire(job)
    leases = race(8, lambda index: jobs.claim(job.pk, step="ingest", owner=f"worker-{index}"))
    assert sorted(lease.seq for lease in leases if lease is not None) == [2]


@pytest.mark.django_db(transaction=True)
def test_many_sweepers_requeue_a_lost_job_once(acme, redis_server):
    job = factories.make_job(factories.make_repo(acme))
    take(job)
    expire(job)
    swept = race(6, lambda _index: jobs.sweep())
    assert sum(result.requeued for result in swept) == 1
    assert job.events.filter(new=State.QUEUED).count() == 1


@pytest.mark.django_db(transaction=True)
def test_a_write_succeeds_soon_while_redis_is_down(acme):
    job = factories.make_job(factories.make_repo(acme))
    started = time.monotonic()
    jobs.cancel(job)
    jobs.retry(job)
    # The bound of the promise (2 s a write) with room for a busy machine.
    assert time.monotonic() - started < 8
    assert Job.objects.get(pk=job.pk).state == State.QUEUED
