import json
import logging
import os
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from django.core.management.base import BaseCommand

from deltacome_core.client import HubClient
from deltacome_core.errors import DeltaError
from hub.demo import seed
from hub.demo.main_job import PART_BYTES, run_main_job
from hub.demo.smollm import prepare_checkpoint
from hub.demo.stack import ROOT, STOP_TIMEOUT_S, Stack

DEFAULT_PORT = 8000
WATCH_S = 0.5
# A Stack ends its processes in half of it.
END_TIMEOUT_S = 2 * STOP_TIMEOUT_S
# SIGINT is named as well: what a script starts in the background inherits it ignored.
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The examples have 8 MB: with parts of 16 MiB an upload that breaks off would have kept nothing.
UPLOAD_PART_BYTES = 2**20
CARD = """
  DeltaCoMe Hub    {url}
  user             {username}
  password         {password}
  API token        {token}

  Upload this      {folder}
  logs             {logs}
  stop             Ctrl-C
"""


class _Ended(BaseException):
    """A signal ends the demo.

    No KeyboardInterrupt: where that comes out of an `exec`, as those of dataclasses, Python ends
    with the signal's status although it was caught.
    """


class Command(BaseCommand):
    help = "Run a seeded hub on this machine until Ctrl-C."
    requires_system_checks: list[str] = []  # the stack's processes have their own settings

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--check", action="store_true", help="do the main job headless, print one JSON line"
        )
        parser.add_argument(
            "--smollm", action="store_true", help="add SmolLM2-135M-Instruct as a backbone"
        )
        parser.add_argument("--port", type=int, default=DEFAULT_PORT)
        parser.add_argument("--data-dir", type=Path, default=ROOT / "var" / "demo")

    def handle(self, *_args: Any, **options: Any) -> None:
        logging.getLogger("httpx").setLevel(logging.WARNING)
        try:
            # Like Ctrl-C: `kill` and a closed terminal end the children too.
            for number in ENDS:
                signal.signal(number, _end)
            _run(options)
        except _Ended:
            _say("stopped")


def _run(options: dict[str, Any]) -> None:
    try:
        if options["check"]:
            _check_main_job()
        else:
            _serve(options["data_dir"], options["port"], with_smollm=options["smollm"])
    except DeltaError as error:
        _say(f"demo: {error}")
        sys.exit(1)


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    # Once is enough: another one would break off what ends the children.
    for number in ENDS:
        signal.signal(number, signal.SIG_IGN)
    # Python drops what is raised in a callback of its collector, and an interrupted wait can leave
    # its lock taken. The children end with this process in any case.
    signal.signal(signal.SIGALRM, _leave)
    signal.setitimer(signal.ITIMER_REAL, END_TIMEOUT_S)
    raise _Ended


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    _say("stopped")
    os._exit(0)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _serve(data_dir: Path, port: int, *, with_smollm: bool) -> None:
    _say("starting Redis, web, workers, sweeper and engine")
    extra_env = {"UPLOAD_PART_BYTES": str(UPLOAD_PART_BYTES)}
    with Stack(data_dir=data_dir, port=port, extra_env=extra_env) as stack:
        account = seed.open_account(stack)
        with HubClient(stack.url, account.token) as client:
            publish = partial(seed.publish, client, say=_say, watch=partial(stack.revive, say=_say))
            publish(seed.EXAMPLES / "backbone", seed.BACKBONE, kind="backbone")
            print(
                CARD.format(
                    url=stack.url,
                    username=account.username,
                    password=account.password,
                    token=account.token,
                    folder=seed.EXAMPLES / "extraction",
                    logs=stack.data_dir / "logs",
                ),
                flush=True,
            )
            publish(seed.EXAMPLES / "dates", seed.DATES, kind="delta")
            if with_smollm:
                _say("installing and converting SmolLM2-135M-Instruct (once)")
                folder = prepare_checkpoint(stack.data_dir)
                publish(folder, seed.SMOLLM, kind="backbone")
        _say("everything is published; Ctrl-C ends the hub")
        _watch(stack)


def _watch(stack: Stack) -> NoReturn:
    while True:
        time.sleep(WATCH_S)
        stack.revive(say=_say)


def _check_main_job() -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="deltacome-check-") as folder:
        extra_env = {"UPLOAD_PART_BYTES": str(PART_BYTES)}
        with Stack(data_dir=Path(folder) / "data", extra_env=extra_env) as stack:
            try:
                account = seed.open_account(stack)
                report = run_main_job(stack, account, Path(folder) / "work", say=_say)
            except DeltaError:
                _say(stack.read_logs(list(stack.processes)))
                raise
    _say(f"done in {time.monotonic() - started:.0f} s")
    for fault in (faults := report.find_faults()):
        _say(f"demo: {fault}")
    print(json.dumps(report.to_json()), flush=True)
    if faults:
        sys.exit(1)
