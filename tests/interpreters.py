"""Code that needs an interpreter of its own: Triton reads its environment once, at its import."""

import os
import subprocess
import sys
from dataclasses import replace


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


def skip_unread_checks():
    """Leave out the sums by which the interpreter looks for overflow.

    They are a third of its work, and what they find is dropped: asserts belong to a debug mode
    that is off (triton 3.6 to 3.9, `binary_op_sanitize_overflow_impl` and `device_assert`).
    """
    from triton.runtime.interpreter import interpreter_builder

    options = interpreter_builder.options
    assert not options.debug
    interpreter_builder.options = replace(options, sanitize_overflow=False)
