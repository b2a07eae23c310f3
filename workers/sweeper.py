"""Heals the queue every SWEEP_S: `python -m workers.sweeper`. Several may run at once."""

import logging
import os
import signal
import threading

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
    while not stopping.is_set():
        _sweep_once()
        stopping.wait(settings.SWEEP_S)


def _sweep_once() -> None:
    from hub import jobs
    from workers.workspace import prune_workspaces

    try:
        swept = jobs.sweep()
        removed = prune_workspaces()
    except (DatabaseError, InterfaceError) as error:
        # The next round asks again; a sweeper that dies heals nothing.
        log.warning("sweep_failed", extra={"reason": str(error)})
        connection.close()
        return
    if swept.requeued or swept.failed or swept.rung or removed:
        log.info(
            "swept",
            extra={
                "requeued": swept.requeued,
                "failed": swept.failed,
                "rung": swept.rung,
                "workspaces_removed": removed,
            },
        )


if __name__ == "__main__":
    main()
