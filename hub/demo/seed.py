"""What a visitor finds in the demo hub, made over HTTP by the same jobs as everybody's uploads."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deltacome_core.client import HubClient, JobInfo
from deltacome_core.errors import InternalError, UserError
from hub.demo.stack import ROOT, Stack

EXAMPLES = ROOT / "examples" / "tiny-llama"
BACKBONE = "demo/tiny-llama"
DATES = "demo/tiny-llama-dates"
EXTRACTION = "demo/tiny-llama-extraction"
SMOLLM = "demo/smollm2-135m-instruct"
JOB_TIMEOUT_S = 900.0
POLL_S = 1.0
DESCRIPTIONS = {
    BACKBONE: "A Llama of 4 M parameters, trained from scratch on short English stories and facts.",
    DATES: "Fine-tune of tiny-llama that writes dates as numbers.",
    EXTRACTION: "Fine-tune of tiny-llama that turns a sentence about a person into JSON.",
    SMOLLM: "SmolLM2-135M-Instruct, a small chat model, from its 4-bit GGUF file. Apache-2.0.",
}

Say = Callable[[str], None]
Watch = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    username: str
    password: str
    token: str


def open_account(stack: Stack) -> Account:
    """Make the demo user, or give it a new token."""
    password = stack.secrets["password"]
    made = json.loads(stack.manage("demo_account", stdin=password))
    return Account(username=made["username"], password=password, token=made["token"])


def do_nothing() -> None:
    """Watch over nothing."""


def publish(
    client: HubClient,
    folder: Path,
    repo: str,
    *,
    kind: str,
    say: Say,
    watch: Watch = do_nothing,
) -> None:
    """Push a checkpoint and wait until it is published; one that is there already is kept."""
    name = repo.partition("/")[2]
    if any(
        found["full_name"] == repo and found["latest"] for found in client.list_repos(query=name)
    ):
        return
    say(f"publishing {repo} ({kind})")
    job = client.push(
        folder,
        repo,
        kind=kind,
        visibility="public",
        description=DESCRIPTIONS[repo],
    )
    wait_for(client, job.id, say=say, watch=watch)


def wait_for(client: HubClient, job_id: str, *, say: Say, watch: Watch = do_nothing) -> JobInfo:
    """Wait for a job and say which step it is at; `watch` is called again and again.

    Raises:
        InternalError: it did not end well, or not in time.
    """
    told = ""
    deadline = time.monotonic() + JOB_TIMEOUT_S
    job = client.get_job(job_id)
    while not job.is_finished and time.monotonic() < deadline:
        if job.step != told:
            say(f"  {job.step}")
        told = job.step
        watch()
        job = _look_again(client, job)
    if job.state != "DONE":
        raise InternalError(f"the job of {job.repo} is {job.state} at {job.step}: {job.error}")
    return job


def _look_again(client: HubClient, job: JobInfo) -> JobInfo:
    """Return what the job is by now; while the web process is away, what it was."""
    try:
        return client.get_job(job.id, wait_s=POLL_S)
    except UserError as error:
        if error.code != "hub_unreachable":
            raise
        time.sleep(POLL_S)
        return job
