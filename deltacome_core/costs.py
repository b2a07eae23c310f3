"""What a run costs: seconds by stage, and the memory that it takes from the machine."""

import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

_STATUS = Path("/proc/self/status")
_SAMPLE_SECONDS = 0.02
_ANONYMOUS = b"RssAnon:"


class Stages:
    """Adds up the seconds of named stages; they may overlap, being done by several threads."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._turn = threading.Lock()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count the time until the block ends."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - started)

    def add(self, name: str, seconds: float) -> None:
        """Count more seconds of a stage."""
        with self._turn:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    @property
    def seconds(self) -> dict[str, float]:
        with self._turn:
            return dict(self._seconds)


def anonymous_bytes() -> int | None:
    """Return this process's memory that no file backs; None where the system does not tell.

    Pages of mapped files, such as the libraries of CUDA, belong to the page cache.
    """
    try:
        lines = _STATUS.read_bytes().splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith(_ANONYMOUS)]
    return int(found[0].split()[1]) * 1024 if found else None


class HostPeak:
    """Watches the anonymous memory of this process while a block runs.

    Sampled every 20 ms: a shorter peak can be missed. Where the system does not tell, the largest
    resident size that the process ever had is taken, which is more.
    """

    def __init__(self) -> None:
        self._bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._note()
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._done.set()
        self._thread.join()
        self._note()

    @property
    def bytes(self) -> int:
        if self._bytes:
            return self._bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Linux counts in KiB, macOS in bytes.
        return peak if sys.platform == "darwin" else peak * 1024

    def _note(self) -> None:
        self._bytes = max(self._bytes, anonymous_bytes() or 0)

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._note()
