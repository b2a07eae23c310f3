"""`make demo` as it is run: real processes, ended in every way a person ends them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from source_tree import ROOT

from deltacome_core.errors import InternalError
from hub.demo.stack import MAX_REVIVALS, Stack, load_secrets, lock_folder, pick_port

STEPS = ["ingest", "compress", "verify", "evaluate", "publish"]
START_TIMEOUT_S = 60
END_TIMEOUT_S = 20
N_PROCESSES = 6


@contextmanager
def start_demo(*arguments):
    """Run the demo; it ends with the test, also where the test fails."""
    # The settings of the tests stay here: a person's shell has none.
    ours = ("DJANGO_SETTINGS_MODULE", "SECRET_KEY", "DATABASE_URL", "DELTACOME_DATA_DIR")
    env = {key: value for key, value in os.environ.items() if key not in ours}
    with subprocess.Popen(
        [sys.executable, "manage.py", "demo", *arguments],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as demo:
        try:
            yield demo
        finally:
            # Its children end themselves, as the test of SIGKILL shows.
            demo.kill()


def test_the_headless_demo_does_the_main_job():
    with start_demo("--check") as demo:
        stdout, stderr = demo.communicate(timeout=600)
    assert demo.returncode == 0, stderr
    report = json.loads(stdout.splitlines()[-1])
    assert list(report["seconds"]) == STEPS
    assert report["accuracy"]["finetune"] - report["accuracy"]["backbone"] > 0.9
    assert abs(report["accuracy"]["finetune"] - report["accuracy"]["delta"]) <= 0.02
    assert report["finetune_bytes"] / report["delta_bytes"] == pytest.approx(
        report["ratio"], abs=1e-3
    )
    assert report["recovery"] >= 0.98
    assert report["parts_kept_after_kill"] > 0


def end_demo(demo, children, number):
    """Send a signal and see that nothing of the demo is left."""
    assert len(children) >= N_PROCESSES
    # As somebody impatient does.
    for _ in range(2):
        demo.send_signal(number)
    demo.wait(timeout=END_TIMEOUT_S)
    _, alive = psutil.wait_procs(children, timeout=END_TIMEOUT_S)
    assert [process.cmdline() for process in alive] == []
    assert demo.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_demo_that_is_still_starting_leaves_no_process_behind(tmp_path, number):
    with start_demo("--data-dir", str(tmp_path), "--port", "0") as demo:
        threading.Thread(target=lambda: sys.stderr.write(demo.stderr.read()), daemon=True).start()
        deadline = time.monotonic() + START_TIMEOUT_S
        children = []
        while len(children) < N_PROCESSES and time.monotonic() < deadline:
            time.sleep(0.1)
            children = psutil.Process(demo.pid).children(recursive=True)
        end_demo(demo, children, number)


def test_a_signal_in_the_middle_of_an_import_ends_the_demo_well():
    """Modules that define dataclasses execute text: an interrupt there is caught like others."""
    script = """
import os, signal
from hub.management.commands import demo
demo._run = lambda _: exec("os.kill(os.getpid(), signal.SIGTERM)", {"os": os, "signal": signal})
demo.Command().handle()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "stopped\n")


def test_a_demo_ends_although_the_interrupt_was_lost():
    script = """
import os, signal, time
from hub.management.commands import demo

class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

def run(_):
    Lost()
    time.sleep(60)

demo.END_TIMEOUT_S = 1
demo._run = run
demo.Command().handle()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "Exception ignored in: <function Lost.__del__" in done.stderr
    assert done.stderr.endswith("stopped\n")


def find_child(demo, *words):
    """Return the process with these words in its command that the demo itself has started."""
    for child in psutil.Process(demo.pid).children():
        # One that was just killed has no command line any more.
        with suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
            if set(words) <= set(child.cmdline()):
                return child
    return None


def wait_for_another(demo, killed, *words):
    deadline = time.monotonic() + END_TIMEOUT_S
    while find_child(demo, *words) in {None, killed} and time.monotonic() < deadline:
        time.sleep(0.1)
    assert find_child(demo, *words) not in {None, killed}


def test_the_demo_starts_again_what_was_killed_and_leaves_nothing_behind(tmp_path):
    """Also while it fills the hub itself, which it does over HTTP."""
    with start_demo("--data-dir", str(tmp_path), "--port", "0") as demo:
        said = []
        threading.Thread(target=lambda: said.extend(demo.stderr), daemon=True).start()
        card = read_card(demo)
        assert card["password"] == load_secrets(tmp_path)["password"]
        for words in (("worker", "gpu"), ("hub.asgi:application",)):
            killed = find_child(demo, *words)
            killed.kill()
            wait_for_another(demo, killed, *words)
        assert demo.poll() is None
        end_demo(demo, psutil.Process(demo.pid).children(recursive=True), signal.SIGINT)
    told = [line for line in said if "started again" in line]
    assert told == [f"{name} ended; it is started again\n" for name in ("worker-gpu", "web")]


def test_what_dies_again_and_again_ends_the_demo(tmp_path, monkeypatch):
    stack = Stack(data_dir=tmp_path / "data")
    monkeypatch.setattr(stack, "commands", lambda: {"web": ["false"]})
    said = []
    stack.start("web")
    for _ in range(MAX_REVIVALS):
        stack.processes["web"].wait()
        stack.revive(say=said.append)
    stack.processes["web"].wait()
    with pytest.raises(InternalError, match="web ended again and again"):
        stack.revive(say=said.append)
    assert len(said) == MAX_REVIVALS


def read_card(demo):
    """Read stdout until the card is complete."""
    card = {}
    for line in demo.stdout:
        label, _, value = line.strip().rpartition(" ")
        card[label.strip()] = value
        if label.strip() == "stop":
            return card
    raise AssertionError("the demo ended before it printed its card")


def test_a_second_demo_keeps_its_hands_off_the_data(tmp_path):
    with (
        lock_folder(tmp_path),
        pytest.raises(InternalError, match="another demo"),
        lock_folder(tmp_path),
    ):
        pass


def test_a_busy_port_is_replaced_by_a_free_one():
    import socket

    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        wanted = busy.getsockname()[1]
        assert pick_port(wanted) != wanted


def test_secrets_are_made_once_and_readable_by_their_owner_only(tmp_path):
    made = load_secrets(tmp_path / "data")
    assert load_secrets(tmp_path / "data") == made
    assert Path(tmp_path / "data" / "secrets.json").stat().st_mode & 0o077 == 0
