"""Kernels are compiled in processes of their own before a delta is ready; others answer meanwhile.

A process that compiled while it answers would make every answer wait for Python's lock.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from deltacome_core.errors import UserError
from kernels.wanted import Wanted, dump_request
from workers.engine.config import SOURCE_DIR
from workers.engine.metrics import EngineMetrics

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "kernels.precompile")
LIMIT_S = 900.0
_MOST_WORKERS = 16


class KernelPreparation:
    """Compiles what is wanted, once; one caller at a time."""

    def __init__(
        self,
        metrics: EngineMetrics,
        *,
        command: Sequence[str] = COMMAND,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._metrics = metrics
        self._command = tuple(command)
        self._limit_s = limit_s
        self._process: subprocess.Popen[str] | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def prepare(self, wanted: Sequence[Wanted]) -> None:
        """Return when Triton's cache holds all kernels that the current GPU will launch.

        Raises:
            UserError: kernels_not_compiled.
        """
        # A process without a GPU never pays for Triton.
        from kernels.precompile import is_compiled
        from kernels.triton_ops.launch_batch import current_arch

        arch = current_arch()
        missing = [one for one in wanted if not is_compiled(one, arch=arch)]
        if missing:
            started_s = time.monotonic()
            log.info("kernels_wanted: compiling for sm_%d", arch)
            self.compile(missing, arch=arch)
            seconds = time.monotonic() - started_s
            self._metrics.prepare_seconds.observe(seconds)
            log.info("kernels_ready: after %.1f s", seconds)

    def compile(self, wanted: Sequence[Wanted], *, arch: int) -> None:
        """Compile in another process and wait for its end.

        Raises:
            UserError: kernels_not_compiled.
        """
        asked = dump_request(wanted, arch=arch)
        # Answers keep half of the machine.
        workers = max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) // 2))
        with subprocess.Popen(
            [*self._command, "--workers", str(workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=SOURCE_DIR,
            # The processes that it forks end with it.
            start_new_session=True,
        ) as process:
            self._process = process
            self._metrics.preparing.set(1)
            try:
                _, said = process.communicate(asked, timeout=self._limit_s)
            except subprocess.TimeoutExpired as error:
                reason = f"compiling took more than {self._limit_s:g} s"
                raise UserError("kernels_not_compiled", reason=reason) from error
            finally:
                _kill(process)
                self._process = None
                self._metrics.preparing.set(0)
        if process.returncode:
            log.error("kernels_not_compiled: %s", said)
            last = said.strip().rpartition("\n")[2] or f"it ended with {process.returncode}"
            raise UserError("kernels_not_compiled", reason=last[:300].rstrip("."))

    def close(self) -> None:
        """End what compiles; who waits for it gets an error."""
        process = self._process
        if process is not None:
            _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
