"""What a child says to its supervisor: one JSON object a line."""

import json
import threading
from collections.abc import Mapping
from typing import IO, Any, Protocol

MAX_LINE_BYTES = 64 * 1024


class Report(Protocol):
    """How a step tells how far it is; `done` and `total` count what the step works through."""

    def progress(self, *, done: int, total: int, **detail: str | float) -> None: ...
    def log(self, text: str) -> None: ...


class Channel:
    """Writes to the pipe the supervisor reads; threads of a step may share it."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._turn = threading.Lock()

    def progress(self, *, done: int, total: int, **detail: str | float) -> None:
        self.send("progress", {"done": done, "total": total, **detail})

    def log(self, text: str) -> None:
        self.send("log", {"text": text[:2000]})

    def send(self, kind: str, data: Mapping[str, Any]) -> None:
        line = json.dumps({"type": kind, "data": data}).encode() + b"\n"
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"a {kind} line of {len(line)} bytes is too long")
        with self._turn:
            self._pipe.write(line)
            self._pipe.flush()
