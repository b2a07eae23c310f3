"""A real engine over a blob store of its own, and a caller that speaks to it as the hub does."""

import json
import threading
import time
from contextlib import contextmanager

import httpx
import tiny
import uvicorn

from deltacome_core.compress import compress_checkpoint
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import reconstruct_checkpoint
from hub.storage import LocalStore

SECRET = "a secret of the tests"


@contextmanager
def serve(app):
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        if time.monotonic() > deadline:
            raise RuntimeError("the engine did not start")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)


def make_engine(root, **fields):
    from workers.engine.app import create_app

    return create_app(make_config(root, **fields), LocalStore(root / "blobs"))


def make_config(root, **fields):
    from workers.engine.config import EngineConfig

    defaults = {
        "cache_dir": root / "cache",
        "secret": SECRET,
        "host": "127.0.0.1",
        "port": 0,
        "device": "cpu",
        "memory_bytes": 1 << 30,
        "max_sequences": 8,
        "max_output_tokens": 200,
        "prefill_chunk_tokens": 16,
    }
    return EngineConfig(**defaults | fields)


def no_claim(_stored):
    """No rows refer to these blobs; nothing prunes them."""


class Models:
    """One backbone and deltas of it, on disk and in the store."""

    def __init__(self, root):
        self.root = root
        self.store = LocalStore(root / "blobs")
        tiny.save(tiny.make_model(), root / "backbone")

    def add_delta(self, name, *, seed, new_rows=0):
        tuned = tiny.tune(tiny.make_model(), seed=seed, size=0.05, new_rows=new_rows)
        folder = self.root / name
        tiny.save(tuned, folder / "tuned")
        recipe = get_recipe("datafree", matrix_bits=3.0)
        compress_checkpoint(self.root / "backbone", folder / "tuned", folder / "delta", recipe)
        reconstruct_checkpoint(self.root / "backbone", folder / "delta", folder / "rebuilt")
        return folder

    def snapshot(self, folder):
        files = {
            path.name: self.store.put_file(path, no_claim).sha256
            for path in sorted(folder.iterdir())
        }
        return {"digest": "d" * 64, "files": files}

    def target(self, delta=None):
        return {
            "backbone": self.snapshot(self.root / "backbone"),
            "delta": None if delta is None else self.snapshot(self.root / delta / "delta"),
        }

    def rebuilt(self, delta=None):
        return self.root / "backbone" if delta is None else self.root / delta / "rebuilt"


class Caller:
    """Asks an engine as the hub does."""

    def __init__(self, url, models):
        self.models = models
        self.client = httpx.Client(base_url=url, timeout=30)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()

    def headers(self, delta):
        return {
            "x-engine-secret": SECRET,
            "x-deltacome-target": json.dumps(self.models.target(delta)),
        }

    def post(self, route, body, *, delta=None, headers=None):
        headers = self.headers(delta) if headers is None else headers
        return self.client.post(f"/v1/{route}", json={"model": "m"} | body, headers=headers)

    def stream(self, route, body, *, delta=None):
        """Yield (time, event) for each data line."""
        body = {"model": "m", "stream": True} | body
        headers = self.headers(delta)
        with self.client.stream("POST", f"/v1/{route}", json=body, headers=headers) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: "):
                    text = line.removeprefix("data: ")
                    yield time.monotonic(), text if text == "[DONE]" else json.loads(text)

    def health(self):
        return self.client.get("/healthz").json()

    def wait_until_idle(self):
        deadline = time.monotonic() + 10
        while self.health()["running"]:
            assert time.monotonic() < deadline, "a sequence went on without anyone listening"
            time.sleep(0.02)
