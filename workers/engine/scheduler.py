"""One thread computes; every answer in the making gets one step a turn."""

import logging
import threading
from collections import deque

from workers.engine.errors import too_busy
from workers.engine.generate import Sequence

log = logging.getLogger(__name__)


class Scheduler:
    """Round robin over the running sequences, so that two columns of a page fill side by side."""

    def __init__(self, *, max_sequences: int) -> None:
        self._max_sequences = max_sequences
        self._waiting: deque[Sequence] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._running = 0
        self._thread = threading.Thread(target=self._run, name="engine-compute", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def running(self) -> int:
        return self._running

    def submit(self, sequences: list[Sequence]) -> None:
        """Take all of them or none: a request of several prompts is one request."""
        with self._changed:
            if self._running + len(sequences) > max(self._max_sequences, len(sequences)):
                raise too_busy(
                    "Every place of the engine is taken; try again in a moment.",
                    code="engine_busy",
                    retry_after_s=2,
                )
            self._running += len(sequences)
            self._waiting.extend(sequences)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                sequence = self._waiting.popleft()
            if self._advance(sequence):
                with self._changed:
                    self._waiting.append(sequence)
            else:
                with self._changed:
                    self._running -= 1

    def _advance(self, sequence: Sequence) -> bool:
        """Give one step; False when the sequence has ended, however it did."""
        if sequence.cancelled:
            return False
        try:
            sequence.step()
        except Exception as error:
            # One answer's failure must not end the others.
            log.exception("sequence_failed")
            sequence.fail(error)
        return not sequence.finished
