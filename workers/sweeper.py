"""Heals the queue every SWEEP_S: `python -m workers.sweeper`. Several may run at once."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict

import django
from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection

log = logging.getLogger(__name__)


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "hub.settings")
    django.setup()
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    tidied_at = float("-inf")
    while not stopping.is_set():
        _try(sweep)
        if time.monotonic() - tidied_at > settings.TIDY_S:
            tidied_at = time.monotonic()
            _try(tidy)
        stopping.wait(settings.SWEEP_S)


def _try(work: Callable[[], dict[str, int]]) -> None:
    try:
        found = work()
    except (DatabaseError, InterfaceError) as error:
        # The next round asks again; a sweeper that dies heals nothing.
        log.warning("sweep_failed", extra={"reason": str(error)})
        connection.close()
        return
    if any(found.values()):
        log.info("swept", extra=found)


def sweep() -> dict[str, int]:
    """Requeue what lost its worker and ring for what waits."""
    from hub import jobs

    return asdict(jobs.sweep())


def tidy() -> dict[str, int]:
    """Let go of what nothing refers to any more."""
    from hub import blobs, uploads
    from workers.workspace import prune_workspaces

    return {
        "workspaces_removed": prune_workspaces(),
        "uploads_expired": uploads.expire_uploads(),
        "blobs_pruned": blobs.prune_blobs(),
    }


if __name__ == "__main__":
    main()
