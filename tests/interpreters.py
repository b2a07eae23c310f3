"""Code that needs an interpreter of its own: Triton reads its environment once, at its import."""

import os
import subprocess
import sys


def run_interpreted(code, *arguments):
    return run_here(code, *arguments, TRITON_INTERPRET="1")


def run_here(code, *arguments, **env):
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=inherited | env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(keepends=True)[-1]
