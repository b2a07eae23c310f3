import json
import time

import factories
import pytest
import redis

from hub import events, jobs
from hub.models import Job

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def job(acme):
    job = factories.make_job(factories.make_repo(acme))
    job.record()
    jobs.announce(job)
    return job


@pytest.fixture
def headers(alice):
    return {"authorization": f"Bearer {factories.make_token(alice)}"}


def read(live_client, job, headers, **more):
    """Read the stream to its end and return [(id, type, data)]."""
    found, current = [], {}
    with live_client.stream(
        "GET", f"/api/v1/jobs/{job.pk}/events", headers=headers | more
    ) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if not line and current:
                found.append((current["id"], current["event"], json.loads(current["data"])))
                current = {}
            elif line and not line.startswith(":"):
                name, _, value = line.partition(": ")
                current[name] = value
    return found


def finish(job):
    lease = jobs.claim(job.pk, step="ingest", owner="w")
    events.publish_event(job.pk, "progress", {"layer": 1})
    jobs.fail(lease, "nan_weights", {"tensors": ["a"]}, retryable=False)


def test_a_finished_job_replays_everything_and_closes(live_client, redis_server, job, headers):
    finish(job)
    found = read(live_client, job, headers)
    assert [kind for _, kind, _ in found] == ["stage", "stage", "progress", "done"]
    assert found[-1][2]["code"] == "nan_weights"


def test_events_arrive_while_the_job_runs(live_client, redis_server, job, headers, later):
    later(0.4, lambda: finish(Job.objects.get(pk=job.pk)))
    found = read(live_client, job, headers)
    assert [kind for _, kind, _ in found] == ["stage", "stage", "progress", "done"]
    assert found[0][2]["state"] == "QUEUED"


def test_a_move_seen_in_the_database_first_is_told_once(
    live_client, redis_server, job, headers, later, monkeypatch
):
    publish = events.publish_event

    def publish_late(*args):
        time.sleep(0.5)
        publish(*args)

    monkeypatch.setattr(events, "publish_event", publish_late)
    later(0, lambda: finish(Job.objects.get(pk=job.pk)))
    time.sleep(0.2)
    found = read(live_client, job, headers)
    assert [kind for _, kind, _ in found] == ["stage", "stage", "progress", "done"]


def test_a_reader_that_comes_back_goes_on_after_its_last_event(
    live_client, redis_server, job, headers
):
    finish(job)
    first = read(live_client, job, headers)
    rest = read(live_client, job, headers, **{"last-event-id": first[0][0]})
    assert rest == first[1:]


def test_a_reader_that_saw_the_end_hears_done_again(live_client, redis_server, job, headers):
    finish(job)
    last = read(live_client, job, headers)[-1][0]
    rest = read(live_client, job, headers, **{"last-event-id": last})
    assert [kind for _, kind, _ in rest] == ["done"]


def test_the_rows_replace_a_stream_that_redis_lost(
    live_client, redis_server, job, headers, settings
):
    finish(job)
    with redis.Redis.from_url(settings.REDIS_URL) as client:
        client.flushall()
    found = read(live_client, job, headers)
    assert [(kind, data["state"]) for _, kind, data in found] == [
        ("stage", "QUEUED"),
        ("stage", "RUNNING"),
        ("done", "FAILED"),
    ]


def test_without_redis_the_rows_alone_are_told(live_client, job, headers):
    finish(job)
    assert [kind for _, kind, _ in read(live_client, job, headers)][-1] == "done"


def test_a_quiet_stream_is_kept_alive(live_client, redis_server, job, headers, settings):
    settings.SSE_HEARTBEAT_S = 0.2
    with live_client.stream("GET", f"/api/v1/jobs/{job.pk}/events", headers=headers) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["cache-control"] == "no-cache"
        assert next(line for line in answer.iter_lines() if line.startswith(":")) == ": hb"


def test_the_stream_ends_with_the_right_to_see_it(
    live_client, redis_server, job, bob, headers, settings, later
):
    settings.SSE_HEARTBEAT_S = 0.2
    later(0.3, lambda: bob.memberships.all().delete())
    token = {"authorization": f"Bearer {factories.make_token(bob)}"}
    assert [kind for _, kind, _ in read(live_client, job, token)] == ["stage"]


@pytest.mark.parametrize("last_id", ["x", "1", "1-", "-1-1", "9" * 40 + "-1"])
def test_a_wrong_last_event_id_is_refused(live_client, job, headers, last_id):
    answer = live_client.get(
        f"/api/v1/jobs/{job.pk}/events", headers=headers | {"last-event-id": last_id}
    )
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid")


def test_a_broken_redis_costs_the_publisher_nothing(job):
    events.publish_event(job.pk, "log", {"text": "nobody hears"})
