"""A thousand answers at once through the hub's proxy, and an engine that is killed in between.

    python -m benchmarks.streams --out OUT.json [--streams 1000]

The hub runs in a process of its own, by uvicorn on SQLite. In the place of the engine stands a
server that sends a token every second with the time it was sent, so that what is measured is the
proxy: lost streams, the delay of each token, and the hub's memory.
"""

import argparse
import asyncio
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

HUB_PORT, ENGINE_PORT = 18011, 18012
SECRET = "a secret of this benchmark"  # noqa: S105 nobody else listens
KEY = "a key of this benchmark, which signs nothing that outlives it"
SEED = """
import django
django.setup()
import hashlib
from datetime import timedelta
from django.db.models.functions import Now
from hub import accounts, blobs, tokens
from hub.models import File, Namespace, Repo, Revision
user = accounts.sign_up("bench", "", password="correct horse battery")
owner = Namespace.objects.get(name="bench")
repo = Repo.objects.create(
    namespace=owner, name="base", kind="backbone", visibility="public", created_by=user
)
revision = Revision.objects.create(
    repo=repo, state="PUBLISHED", number=1, digest=hashlib.sha256(b"base").hexdigest(),
    published_at=Now(), created_by=user, size_bytes=1, source_size_bytes=1, n_params=1,
    bits_per_param=16.0,
)
File.objects.create(revision=revision, path="config.json", blob=blobs.keep_chunks([b"{}"]))
print(tokens.mint(user, "bench", scopes=("infer",), expires_in=timedelta(days=1))[1])
"""


def serve_tokens(n_tokens: int) -> None:
    """Stand where the engine does."""

    async def answer(_request: Request) -> StreamingResponse:
        async def chunks() -> Any:
            for number in range(n_tokens):
                sent = {"choices": [{"index": 0, "delta": {"content": "a"}}], "at": time.time()}
                yield f"data: {json.dumps(sent | {'number': number})}\n\n"
                await asyncio.sleep(1)
            yield "data: [DONE]\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=ENGINE_PORT, log_level="warning", backlog=4096)


def start(data_dir: Path, *command: str, **env: str) -> "subprocess.Popen[bytes]":
    inherited = os.environ | {
        "DELTACOME_DATA_DIR": str(data_dir),
        "DJANGO_SETTINGS_MODULE": "hub.settings",
        "ENGINE_URL": f"http://127.0.0.1:{ENGINE_PORT}",
        "ENGINE_SECRET": SECRET,
        "SECRET_KEY": KEY,
        "ALLOWED_HOSTS": "127.0.0.1",
        "INSECURE_HTTP": "1",
    }
    return subprocess.Popen([sys.executable, *command], env=inherited | env)


def prepare(data_dir: Path) -> str:
    """Make the database, a user and a backbone; the user's key."""
    if start(data_dir, "manage.py", "migrate", "-v", "0").wait():
        raise RuntimeError("the database was not made")
    done = subprocess.run(
        [sys.executable, "-c", SEED], check=True, capture_output=True, text=True,
        env=os.environ | {
            "DELTACOME_DATA_DIR": str(data_dir), "DJANGO_SETTINGS_MODULE": "hub.settings",
            "SECRET_KEY": KEY,
        },
    )  # fmt: skip
    return done.stdout.strip().splitlines()[-1]


async def wait_for(url: str) -> None:
    async with httpx.AsyncClient() as client:
        for _ in range(300):
            try:
                await client.get(url)
            except httpx.TransportError:
                await asyncio.sleep(0.1)
            else:
                return
    raise RuntimeError(f"nobody answers at {url}")


async def listen(client: httpx.AsyncClient, key: str, found: dict[str, Any]) -> None:
    """One stream to its end; delays of its tokens, and how it ended."""
    body = {"model": "bench/base", "messages": [{"role": "user", "content": "a"}], "stream": True}
    headers = {"authorization": f"Bearer {key}"}
    started, n_tokens, end = time.time(), 0, "cut"
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as own:
            if own.status_code != httpx.codes.OK:
                found["ends"].append(f"status {own.status_code}")
                return
            async for line in own.aiter_lines():
                if line == "data: [DONE]":
                    end = "done"
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        end = f"error {event['error'].get('code')}"
                        continue
                    if not n_tokens:
                        found["firsts"].append(time.time() - started)
                    found["delays"].append(time.time() - event["at"])
                    n_tokens += 1
    except httpx.HTTPError as error:
        end = f"cut {type(error).__name__}"
    found["ends"].append(end)
    found["tokens"].append(n_tokens)


async def ask_all(key: str, n_streams: int) -> dict[str, Any]:
    found: dict[str, Any] = {"ends": [], "delays": [], "firsts": [], "tokens": []}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{HUB_PORT}", limits=limits, timeout=120
    ) as client:
        await asyncio.gather(*(listen(client, key, found) for _ in range(n_streams)))
    return found


def describe(values: list[float]) -> dict[str, float]:
    ordered = sorted(values) or [0.0]
    return {
        "p50_ms": 1e3 * statistics.median(ordered),
        "p99_ms": 1e3 * ordered[int(0.99 * (len(ordered) - 1))],
        "max_ms": 1e3 * ordered[-1],
    }


def count_ends(found: dict[str, Any]) -> dict[str, int]:
    return {end: found["ends"].count(end) for end in sorted(set(found["ends"]))}


async def measure(data_dir: Path, n_streams: int, n_tokens: int) -> dict[str, Any]:
    key = prepare(data_dir)
    engine_command = ("-m", "benchmarks.streams", "--serve", str(n_tokens))
    engine = start(data_dir, *engine_command)
    hub = start(
        data_dir, "-m", "uvicorn", "hub.asgi:application", "--port", str(HUB_PORT),
        "--no-access-log", "--log-level", "warning", "--lifespan", "off", "--backlog", "4096",
    )  # fmt: skip
    try:
        await wait_for(f"http://127.0.0.1:{HUB_PORT}/v1/models")
        await wait_for(f"http://127.0.0.1:{ENGINE_PORT}/")
        await ask_all(key, 1)
        process = psutil.Process(hub.pid)
        before = process.memory_info().rss
        peak = before
        asking = asyncio.create_task(ask_all(key, n_streams))
        while not asking.done():
            await asyncio.sleep(0.2)
            peak = max(peak, process.memory_info().rss)
        found = asking.result()
        return {
            "streams": n_streams,
            "tokens_each": n_tokens,
            "ends": count_ends(found),
            "lost": n_streams - found["ends"].count("done"),
            "tokens_missing": n_streams * n_tokens - sum(found["tokens"]),
            "delay": describe(found["delays"]),
            "first_token": describe(found["firsts"]),
            "hub_rss_bytes": {"before": before, "peak": peak},
            "killed": await kill_between(key, engine, data_dir, engine_command, n_streams // 10),
        }
    finally:
        for process in (hub, engine):
            process.terminate()


async def kill_between(
    key: str,
    engine: "subprocess.Popen[bytes]",
    data_dir: Path,
    command: tuple[str, ...],
    n_streams: int,
) -> dict[str, Any]:
    """End the engine in the middle of its answers, ask while it is away, and start it again."""
    asking = asyncio.create_task(ask_all(key, n_streams))
    await asyncio.sleep(4)
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    cut = await asking
    away = await ask_all(key, 5)
    again = start(data_dir, *command)
    try:
        await wait_for(f"http://127.0.0.1:{ENGINE_PORT}/")
        back = await ask_all(key, n_streams)
    finally:
        again.terminate()
    return {"streams": n_streams, "cut": count_ends(cut), "away": count_ends(away),
            "back": count_ends(back)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streams", description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--serve", type=int, help="be the server in the engine's place")
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if args.serve:
        serve_tokens(args.serve)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(Path(folder), args.streams, args.tokens))
    text = json.dumps(found, indent=1) + "\n"
    sys.stdout.write(text)
    if args.out is not None:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
