"""The border between supervisor and child, with real processes."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import plant
import pytest
import tiny

from deltacome_core import distil_schedule
from deltacome_core.errors import UserError
from workers import compress
from workers.spec import Candidate, StepSpec, read_spec, write_spec
from workers.supervise import ChildDied, ChildHandle, child_env, run_child


def make_spec(workspace, **fields):
    defaults = {"step": "ingest", "kind": "backbone", "device": "cpu", "parent_pid": os.getpid()}
    (workspace / "reports").mkdir(parents=True, exist_ok=True)
    return StepSpec(workspace=workspace, **defaults | fields)


class Told:
    """A report that is kept instead of sent."""

    def __init__(self):
        self.progresses, self.texts = [], []

    def progress(self, **said):
        self.progresses.append(said)

    def log(self, text):
        self.texts.append(text)


@pytest.fixture
def blocked(tmp_path):
    """A workspace whose lock is held and names nobody: a child waits there for ever."""
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp_path


def wait_until_blocked(pid, workspace):
    """The child asks for the lock last of all its preparations."""

    def holds_the_lock_file():
        # A file may be closed, and its link gone, between listing and reading.
        with contextlib.suppress(FileNotFoundError):
            links = [link.readlink() for link in Path(f"/proc/{pid}/fd").iterdir()]
            return workspace / ".lock" in links

    plant.wait_for(holds_the_lock_file, what="the child waits for the lock")


def run_in_thread(spec, handle):
    """Start run_child and give the thread, the list of what it raised, and the child."""
    raised = []

    def run():
        try:
            run_child(spec, handle, lambda *_: None)
        except ChildDied as death:
            raised.append(death)

    thread = threading.Thread(target=run)
    thread.start()
    process = plant.wait_for(lambda: handle._process, what="the child starts")
    wait_until_blocked(process.pid, spec.workspace)
    return thread, raised, process


def test_layers_and_then_the_steps_of_training_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(distil_schedule, "ON_CPU", replace(distil_schedule.ON_CPU, steps=2))
    spec = make_spec(
        tmp_path, step="compress", kind="delta", recipe="distilled", bits_per_param=4.0
    )
    model = tiny.make_model()
    tiny.save(model, spec.backbone)
    tiny.save(tiny.tune(model), spec.tuned)
    tiny.write_calibration(spec.tuned)
    told = Told()
    compress.run(spec, told)
    layers = [said["layer"] for said in told.progresses if "layer" in said]
    assert layers[:2] == ["model.layers.0", "model.layers.1"]
    assert told.progresses[len(layers) :] == [
        {"done": step, "total": 2, "stage": "training"} for step in (1, 2)
    ]
    assert told.texts[-1].startswith(("Distilled in", "Not distilled (not_better)"))


def test_a_job_without_text_to_train_on_says_which_file_to_bring(tmp_path):
    spec = make_spec(
        tmp_path, step="compress", kind="delta", recipe="distilled", bits_per_param=4.0
    )
    model = tiny.make_model()
    tiny.save(model, spec.backbone)
    tiny.save(tiny.tune(model), spec.tuned)
    told = Told()
    compress.run(spec, told)
    assert not any("stage" in said for said in told.progresses)
    assert "no_own_text" in told.texts[-1]
    assert "calibration.jsonl" in told.texts[-1]


def test_a_spec_crosses_the_border_unchanged(tmp_path):
    rival = Candidate(revision="r", folder="/f")
    spec = make_spec(tmp_path, candidates=(rival,), bits_per_param=1.5, recipe="come")
    write_spec(spec, tmp_path / "spec.json")
    assert read_spec(tmp_path / "spec.json") == spec


def test_a_child_knows_no_secret(monkeypatch):
    for name in ("DATABASE_URL", "REDIS_URL", "SECRET_KEY", "TOKEN_PEPPER", "ENGINE_SECRET"):
        monkeypatch.setenv(name, "hidden")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    env = child_env()
    assert "hidden" not in env.values()
    assert env["HF_HUB_OFFLINE"] == "1"


def test_what_the_child_finds_wrong_comes_back_with_its_code(tmp_path):
    (tmp_path / "tuned").mkdir()
    with pytest.raises(UserError) as refusal:
        run_child(make_spec(tmp_path), ChildHandle(), lambda *_: None)
    assert refusal.value.code == "not_a_checkpoint"
    assert refusal.value.params["reason"] == "there is no config.json"


def test_a_child_killed_by_a_signal_is_told_apart(blocked):
    thread, raised, process = run_in_thread(make_spec(blocked), ChildHandle())
    os.kill(process.pid, signal.SIGKILL)
    thread.join(30)
    assert [death.returncode for death in raised] == [-signal.SIGKILL]


def test_ending_from_another_thread_ends_the_child(blocked):
    handle = ChildHandle()
    thread, raised, process = run_in_thread(make_spec(blocked), handle)
    handle.end()
    thread.join(30)
    assert len(raised) == 1
    assert process.returncode == -signal.SIGTERM


def test_a_child_ends_when_its_stdin_does(blocked):
    thread, raised, process = run_in_thread(make_spec(blocked), ChildHandle())
    process.stdin.close()
    thread.join(30)
    assert [death.returncode for death in raised] == [1]


def test_a_crash_shows_the_end_of_its_log(tmp_path):
    tiny.save(tiny.make_model(), tmp_path / "tuned")
    spec = make_spec(tmp_path, step="compress")
    with pytest.raises((ChildDied, UserError)) as death:
        run_child(spec, ChildHandle(), lambda *_: None)
    assert "recipe" in str(getattr(death.value, "log_tail", death.value))


def test_ending_a_child_before_it_starts_keeps_it_from_starting(tmp_path):
    handle = ChildHandle()
    handle.end()
    with pytest.raises(ChildDied):
        run_child(make_spec(tmp_path), handle, lambda *_: None)


PARENT = """
import sys, threading, time
from pathlib import Path
from workers.spec import StepSpec
from workers.supervise import ChildHandle, run_child
import os
spec = StepSpec(
    step="ingest", kind="backbone", device="cpu", parent_pid=os.getpid(), workspace=Path(sys.argv[1])
)
handle = ChildHandle()

def tell():
    while handle._process is None:
        time.sleep(0.01)
    print(handle._process.pid, flush=True)

threading.Thread(target=tell).start()
run_child(spec, handle, lambda *_: None)
"""


def test_a_child_dies_with_a_parent_that_could_tell_nobody(blocked):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(blocked)],
        stdout=subprocess.PIPE,
        cwd=plant.ROOT,
        start_new_session=True,
    )
    child = None
    try:
        child = int(parent.stdout.readline())
        wait_until_blocked(child, blocked)
        # Stopped, it cannot notice the end of its stdin: only the kernel can end it.
        os.kill(child, signal.SIGSTOP)
        parent.kill()
        parent.wait()
        plant.wait_for(lambda: not is_running(child), what="the child dies")
    finally:
        if child is not None:
            plant.kill_group(child)
        parent.kill()
        parent.communicate()


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


HOLDER = """
import fcntl, os, sys, time
lock = open(sys.argv[1], "a+")
fcntl.flock(lock, fcntl.LOCK_EX)
lock.write(str(os.getpid()))
lock.flush()
print("held", flush=True)
time.sleep(600)
"""


def test_a_child_left_over_in_the_workspace_is_ended_first(tmp_path):
    tiny.save(tiny.make_model(), tmp_path / "tuned")
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            HOLDER,
            str(tmp_path / ".lock"),
        ],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        found = run_child(make_spec(tmp_path), ChildHandle(), lambda *_: None)
        assert found["n_params"] > 0
        assert holder.wait(10) == -signal.SIGKILL
    finally:
        plant.kill_group(holder.pid)
        holder.communicate()
