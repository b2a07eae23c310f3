"""Start the engine: `python -m workers.engine [--host H] [--port P]`."""

import argparse
import logging
import os
from dataclasses import replace
from types import FrameType

import uvicorn

from hub.storage import get_store
from workers.engine.app import create_app
from workers.engine.config import read_config
from workers.engine.service import Engine


class DrainingServer(uvicorn.Server):
    """Takes no new request from the moment it is told to end, and lets the running ones finish."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._engine.scheduler.stop_admitting()
        super().handle_exit(sig, frame)


def main() -> None:
    # For the blob store's settings only: no database, no broker, no web.
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "hub.settings")
    config = read_config()
    parser = argparse.ArgumentParser(prog="python -m workers.engine", description=__doc__)
    parser.add_argument("--host", default=config.host, help="address to listen on (%(default)s)")
    parser.add_argument("--port", default=config.port, type=int, help="port (%(default)s)")
    options = parser.parse_args()
    config = replace(config, host=options.host, port=options.port)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    app = create_app(config, get_store())
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        log_level="warning",
        access_log=False,
        # Streams that are still open by then are cut; their clients see the connection end.
        timeout_graceful_shutdown=int(config.drain_s) + 1,
    )
    DrainingServer(settings, app.state.engine).run()


if __name__ == "__main__":
    main()
