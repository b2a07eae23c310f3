"""The engine as a process: what operators' machines ask, and how it ends."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from engines import SECRET, Caller, make_engine, serve

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def process(models, tmp_path_factory):
    """A running `python -m workers.engine` over the blobs of the models, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "DJANGO_SETTINGS_MODULE": "hub.settings",
        "INSECURE_HTTP": "1",
        "DELTACOME_DATA_DIR": str(models.root),
        "ENGINE_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "ENGINE_SECRET": SECRET,
        "ENGINE_PORT": str(port),
        "ENGINE_DEVICE": "cpu",
        "SECRET_KEY": "a key of the tests, longer than thirty-two characters",
        "TOKEN_PEPPER": "a pepper of the tests, longer than thirty-two characters",
    }
    with subprocess.Popen([sys.executable, "-m", "workers.engine"], cwd=ROOT, env=env) as running:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(url))
        try:
            yield running, url
        finally:
            running.kill()


def answers(url):
    try:
        return httpx.get(f"{url}/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def wait_until(condition, timeout_s=90):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_a_process_that_is_told_to_end_finishes_its_answers_first(process, models):
    running, url = process
    body = {"prompt": "one two three", "temperature": 0, "max_tokens": 150}
    with Caller(url, models) as caller:
        whole = caller.post("completions", body, delta="one").json()["choices"][0]["text"]
        events = []
        started = threading.Event()

        def listen():
            for _, event in caller.stream("completions", body, delta="one"):
                events.append(event)
                started.set()

        listener = threading.Thread(target=listen)
        listener.start()
        assert started.wait(60)
        running.send_signal(signal.SIGTERM)
        listener.join(60)
    assert events[-1] == "[DONE]"
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == whole
    assert running.wait(60) in {0, -signal.SIGTERM}
    assert not answers(url)


def test_operators_see_counts_and_models(models):
    with serve(make_engine(models.root)) as url, Caller(url, models) as caller:
        assert caller.client.get("/health/live").json() == {"live": True}
        assert caller.client.get("/health/ready").json() == {"ready": True}
        caller.post("completions", {"prompt": "a", "max_tokens": 3}, delta="one")
        caller.wait_until_idle()
        text = caller.client.get("/metrics").text
        assert "deltacome_engine_cold_loads_total 1" in text
        assert "deltacome_engine_resident_models 2" in text
        assert "deltacome_engine_generated_tokens_total" in text
        assert 'deltacome_engine_queue_seconds_count{tenant="' in text
        assert caller.client.get("/status").status_code == 401
        listed = caller.client.get("/status", headers={"x-engine-secret": SECRET}).json()["models"]
        assert [item["canary"] for item in listed] == ["absent", "absent"]
        assert {item["slot"] for item in listed} == {-1, 0}


def test_a_draining_engine_is_alive_but_not_ready(models):
    app = make_engine(models.root)
    with serve(app) as url, Caller(url, models) as caller:
        app.state.engine.scheduler.stop_admitting()
        assert caller.client.get("/health/live").status_code == 200
        assert caller.client.get("/health/ready").status_code == 503
        refused = caller.post("completions", {"prompt": "a"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_stopping"
        assert refused.headers["retry-after"]
