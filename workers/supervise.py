"""Runs the child of a step: starts it without secrets, listens to it, ends it when told."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from deltacome_core.errors import DeltaError, UserError
from workers.report import MAX_LINE_BYTES
from workers.spec import StepSpec, write_spec

log = logging.getLogger(__name__)

TERM_GRACE_S = 5.0
LOG_TAIL_CHARS = 2000
_PROJECT = Path(__file__).resolve().parent.parent
# What a child may know of its surroundings. Databases, brokers, keys and buckets are not on it.
_PASSED_ENV = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "TRITON_CACHE_DIR",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
)

Listener = Callable[[str, Mapping[str, Any]], None]


class ChildDied(DeltaError):  # noqa: N818 (a fact, as LeaseLost is)
    """The child ended without a result: killed, crashed, or out of memory."""

    def __init__(self, *, returncode: int, log_tail: str) -> None:
        super().__init__(f"the child ended with {returncode}")
        self.returncode = returncode
        self.log_tail = log_tail


@dataclass(slots=True)
class ChildHandle:
    """Lets another thread end the child; ending it before it started keeps it from starting."""

    _process: subprocess.Popen[bytes] | None = None
    _ended: bool = False
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def attach(self, start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        with self._turn:
            if self._ended:
                raise ChildDied(returncode=-signal.SIGTERM, log_tail="")
            self._process = start()
            return self._process

    def end(self) -> None:
        """Ask the child's whole process group to stop, then make it."""
        with self._turn:
            self._ended = True
            process = self._process
        if process is None:
            return
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TERM_GRACE_S)
        _signal_group(process, signal.SIGKILL)


def run_child(spec: StepSpec, handle: ChildHandle, on_line: Listener) -> dict[str, Any]:
    """Run one step to its end and return what it reported.

    Raises:
        UserError: what the child found wrong, with its code.
        ChildDied: it ended without a word.
    """
    spec_path = spec.workspace / f"{spec.step}.json"
    write_spec(spec, spec_path)
    with (spec.workspace / f"{spec.step}.log").open("wb+") as stderr:
        process = handle.attach(lambda: _start(spec, spec_path, stderr))
        try:
            ending = _listen(process, on_line)
            # Its pipe is closed: it is on its way out, and how it went is worth knowing.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TERM_GRACE_S)
        finally:
            handle.end()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        if ending is None:
            raise ChildDied(returncode=process.wait(), log_tail=_tail(stderr))
    kind, data = ending
    if kind == "error":
        raise UserError(str(data["code"]), **data["params"])
    return data


def _start(spec: StepSpec, spec_path: Path, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "workers.child", spec.step, str(spec_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        cwd=spec.workspace,
        env=child_env(),
        start_new_session=True,
    )


def child_env() -> dict[str, str]:
    passed = {name: os.environ[name] for name in _PASSED_ENV if name in os.environ}
    return {
        **passed,
        # The working folder holds uploaded files: none of them may become a module.
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(_PROJECT),
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        # Without it cuBLAS may add in another order, and a resumed delta would differ in bits.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


def _listen(
    process: subprocess.Popen[bytes], on_line: Listener
) -> tuple[str, dict[str, Any]] | None:
    ending = None
    stdout = process.stdout
    while stdout is not None and (line := stdout.readline(MAX_LINE_BYTES + 1)):
        try:
            message = json.loads(line)
            kind, data = message["type"], dict(message["data"])
        except (ValueError, KeyError, TypeError):
            log.warning("child_line_unreadable", extra={"size_bytes": len(line)})
            continue
        if kind in {"result", "error"}:
            ending = (kind, data)
        else:
            on_line(kind, data)
    return ending


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    # The group outlives its leader while a grandchild runs; its id is not reused before that.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _tail(stderr: IO[bytes]) -> str:
    stderr.flush()
    size = stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, size - LOG_TAIL_CHARS))
    return stderr.read().decode(errors="replace")
