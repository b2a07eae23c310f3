"""What the thread that computes does while nobody asks: it prepares steps that may come."""

import logging
from weakref import WeakSet

from workers.engine.executor import Executor

log = logging.getLogger(__name__)


class QuietWork:
    """Executors that ran since they last had nothing to prepare; they may leave at any time."""

    def __init__(self) -> None:
        self._executors: WeakSet[Executor] = WeakSet()

    def __bool__(self) -> bool:
        return bool(self._executors)

    def expect(self, executor: Executor) -> None:
        """Note one that runs, so that steps may come which it never had."""
        self._executors.add(executor)

    def do_one(self) -> None:
        """Prepare one step: whoever asks meanwhile waits for no more."""
        for executor in list(self._executors)[:1]:
            try:
                did_prepare = executor.prepare_step()
            except Exception:
                # It is tried again when such a step comes, and fails again if it must.
                log.exception("step_not_prepared")
                did_prepare = False
            if not did_prepare:
                self._executors.discard(executor)
