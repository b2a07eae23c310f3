"""Keeps a lease alive in the background, and says when it is lost."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection

from hub import jobs
from hub.jobs import Lease

log = logging.getLogger(__name__)

RETRY_PAUSE_S = 0.5


class LeaseKeeper:
    """Renews a lease every HEARTBEAT_S until closed; `on_lost` is called once when it is gone.

    After `timeout_s` the work is ended the same way, but the lease stays, so that the failure
    can be written down.

    A database that is away is asked again until the lease must have run out; after that another
    worker may hold the job, and going on would be a second one doing the same.
    """

    def __init__(self, lease: Lease, *, on_lost: Callable[[], None], timeout_s: float) -> None:
        self._lease = lease
        self._on_lost = on_lost
        self._progress: Mapping[str, Any] | None = None
        self._closed = threading.Event()
        self._renewed_at = time.monotonic()
        self._ends_at = self._renewed_at + timeout_s
        self.lost = False
        self.timed_out = False
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def note(self, progress: Mapping[str, Any]) -> None:
        """Send this progress with the next heartbeat."""
        self._progress = progress

    def _run(self) -> None:
        try:
            pause_s = settings.HEARTBEAT_S
            while not self._closed.wait(pause_s):
                pause_s = self._renew()
                if self.lost:
                    self._on_lost()
                    return
                if time.monotonic() > self._ends_at and not self.timed_out:
                    self.timed_out = True
                    self._on_lost()
        finally:
            connection.close()

    def _renew(self) -> float:
        asked_at = time.monotonic()
        try:
            self.lost = not jobs.heartbeat(self._lease, self._progress)
        except (DatabaseError, InterfaceError) as error:
            log.warning("heartbeat_failed", extra={"reason": str(error)})
            connection.close()
            self.lost = time.monotonic() - self._renewed_at > settings.LEASE_TTL_S
            return RETRY_PAUSE_S
        self._renewed_at = asked_at
        return float(settings.HEARTBEAT_S)
