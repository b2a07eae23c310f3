"""Uploads that went through the hub's own door, and workers as they run in production."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import factories

from deltacome_core.checkpoint import checkpoint_digest, hash_tensors, open_checkpoint
from deltacome_core.safetensors_file import read_header
from hub import backbones, uploads
from hub.models import Job
from hub.storage import get_store
from hub.upload_opening import FileSpec, UploadSpec, open_upload

SHORT_LEASES = {
    "LEASE_TTL_S": "3",
    "HEARTBEAT_S": "0.3",
    "SWEEP_S": "0.3",
    "BELL_RESEND_S": "1",
    "RETRY_BACKOFF_S": "0.2",
}
ROOT = Path(__file__).resolve().parents[2]


def publish_backbone(namespace, folder, name="base"):
    """Publish a backbone without a job, for tests of what comes after."""
    checkpoint = open_checkpoint(folder)
    hashes = hash_tensors(checkpoint)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["tensors.json"] = backbones.dump_tensors(checkpoint.layout, hashes)
    return factories.make_revision(
        factories.make_repo(namespace, name, kind="backbone"),
        files=files,
        checkpoint_digest=checkpoint_digest(checkpoint.layout, hashes),
    )


def upload(owner, folder, repo, *, kind="delta", **fields):
    """Upload a folder part by part and seal it; return the job."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    listed = tuple(FileSpec(path=p.name, size_bytes=p.stat().st_size) for p in paths)
    found = open_upload(owner, UploadSpec(repo=repo, kind=kind, files=listed, **fields))
    for index, path in enumerate(paths):
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                uploads.put_header(found, index, file.read(read_header(path).data_start))
    found.refresh_from_db()
    for index, path in enumerate(paths):
        content = path.read_bytes()
        for number, start in enumerate(range(0, len(content), found.part_size_bytes)):
            part = content[start : start + found.part_size_bytes]
            digest = hashlib.sha256(part).hexdigest()
            uploads.store_part(found, index, number, chunks=[part], sha256=digest)
    return uploads.seal_upload(found)


def read_files(revision):
    store = get_store()
    return {file.path: b"".join(store.read(file.blob_id)) for file in revision.files.all()}


@contextmanager
def run_process(*command, env):
    """Run a process in a session of its own; whatever is left of it dies at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, env=env, start_new_session=True
    )
    try:
        yield process
    finally:
        kill_group(process.pid)
        process.wait()


def run_worker(env):
    arguments = ["worker", "-P", "prefork", "-c", "1", "-Q", "io,gpu", "--loglevel=WARNING"]
    arguments += ["--without-gossip", "--without-mingle"]
    return run_process("celery", "-A", "hub.celery", *arguments, env=env)


def run_sweeper(env):
    return run_process("workers.sweeper", env=env)


def kill_group(pid):
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def find_children(job_id):
    """Process ids of the children that work in this job's workspace."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            is_child = b"workers.child" in arguments
            if is_child and any(str(job_id).encode() in argument for argument in arguments):
                found.append(int(folder.name))
    return found


def wait_for(condition, *, what, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout_s} s")
        time.sleep(0.05)
    return found


def wait_for_end(job, *, timeout_s=180):
    def ended():
        job.refresh_from_db()
        return job.is_finished

    wait_for(ended, what=f"{job} ends", timeout_s=timeout_s)
    assert job.state in Job.State.values
    return job
