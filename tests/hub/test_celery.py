import socket
import threading

import factories
import pytest
import redis

from hub import jobs
from hub.celery import app


def test_the_queue_survives_what_was_measured():
    assert (app.conf.task_acks_late, app.conf.worker_disable_prefetch) == (False, True)
    assert app.conf.worker_prefetch_multiplier == 1
    assert app.conf.result_backend is None
    assert (app.conf.task_serializer, app.conf.accept_content) == ("json", ["json"])


@pytest.mark.parametrize("step", sorted({step for steps in jobs.STEPS.values() for step in steps}))
def test_each_step_has_its_queue(step):
    queue = app.conf.task_routes[f"workers.tasks.{step}"]["queue"]
    assert queue == ("io" if step in {"ingest", "publish"} else "gpu")


def test_what_runs_by_the_clock_is_a_registered_task_of_the_io_queue():
    app.loader.import_default_modules()
    timed = {entry["task"] for entry in app.conf.beat_schedule.values()}
    assert timed == {"workers.tasks.sweep", "workers.tasks.tidy"}
    assert timed <= set(app.tasks)
    assert {app.conf.task_routes[name]["queue"] for name in timed} == {"io"}


def read_queue(settings, queue):
    client = redis.Redis.from_url(settings.REDIS_URL)
    with client:
        return client.lrange(f"dch:{queue}", 0, -1)


def test_a_bell_carries_the_job_id_and_nothing_else(redis_server, settings):
    assert jobs.ring("0192d5b0-0000-7000-8000-000000000000", "compress")
    (message,) = read_queue(settings, "gpu")
    assert b'"task": "workers.tasks.compress"' in message
    assert b"argsrepr" in message
    assert read_queue(settings, "io") == []


def test_a_refused_connection_is_only_a_delay():
    assert not jobs.ring("0192d5b0-0000-7000-8000-000000000000", "ingest")


def test_a_silent_broker_is_only_a_delay(settings):
    """A server that accepts and never answers must not hold a request."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings.REDIS_URL = f"redis://127.0.0.1:{server.getsockname()[1]}/0"
        results = []
        ringing = threading.Thread(
            target=lambda: results.append(
                jobs.ring("0192d5b0-0000-7000-8000-000000000000", "ingest")
            )
        )
        ringing.start()
        ringing.join(timeout=10)
        assert results == [False]


@pytest.mark.django_db(transaction=True)
def test_enqueue_rings_after_the_commit(acme, redis_server, settings):
    from django.db import transaction

    job = factories.make_job(factories.make_repo(acme))
    with transaction.atomic():
        jobs.enqueue(job)
        assert read_queue(settings, "io") == []
    assert len(read_queue(settings, "io")) == 1
