"""The process that does the work of one step: `python -m workers.child <step> <spec.json>`.

It holds no credentials and speaks to its supervisor only: JSON lines out, and an open stdin whose
end means that the supervisor is gone. Whatever kills the supervisor kills the child too, so a
device is never held by work that nobody waits for.
"""

import contextlib
import ctypes
import errno
import fcntl
import importlib
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO

from deltacome_core.errors import UserError
from workers.report import Channel
from workers.spec import StepSpec, read_spec

STEPS = ("ingest", "compress", "verify", "evaluate")
_PR_SET_PDEATHSIG = 1
_LOCK_NAME = ".lock"

log = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    step, spec_path = arguments
    spec = read_spec(Path(spec_path))
    _die_with(spec.parent_pid)
    channel = Channel(_take_stdout())
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    with _take_over(spec.workspace):
        _limit(spec)
        return _run(_load_step(step), spec, channel)


def _run(step: ModuleType, spec: StepSpec, channel: Channel) -> int:
    try:
        channel.send("result", step.run(spec, channel))
    except UserError as error:
        channel.send("error", {"code": error.code, "params": error.params})
    except MemoryError:
        log.exception("out_of_memory")
        channel.send("error", {"code": "out_of_memory", "params": {"step": spec.step}})
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise
        channel.send(
            "error",
            {"code": "disk_full", "params": {"needed_bytes": "more", "spare_bytes": "none"}},
        )
    return 0


def _load_step(step: str) -> ModuleType:
    if step not in STEPS:
        raise SystemExit(f"unknown step {step}")
    return importlib.import_module(f"workers.{step}")


def _die_with(parent_pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    # The parent may have died before the line above took effect.
    if os.getppid() != parent_pid:
        raise SystemExit("the supervisor is gone")
    threading.Thread(target=_exit_at_end_of_stdin, daemon=True).start()


def _exit_at_end_of_stdin() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def _take_stdout() -> IO[bytes]:
    """Keep the pipe for our lines; a library that prints goes to stderr."""
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return pipe


@contextlib.contextmanager
def _take_over(workspace: Path) -> Iterator[None]:
    """Be the only child in the workspace; one left over from a fenced attempt is ended.

    The lock dies with its holder, so a held lock proves that the process it names is alive.
    """
    with (workspace / _LOCK_NAME).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.killpg(int(lock.read()), signal.SIGKILL)
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _limit(spec: StepSpec) -> None:
    for kind, size_bytes in (
        (resource.RLIMIT_AS, spec.address_bytes),
        (resource.RLIMIT_FSIZE, spec.file_bytes),
    ):
        if size_bytes:
            resource.setrlimit(kind, (size_bytes, size_bytes))
    # A core dump of a model would fill the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A write past RLIMIT_FSIZE should be an error we can name, not a signal.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
