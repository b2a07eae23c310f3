"""The container files, judged by the real Compose and hadolint binaries."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from source_tree import ROOT

BIN = Path(sys.executable).parent
SECRETS = dict.fromkeys(
    ("SECRET_KEY", "TOKEN_PEPPER", "ENGINE_SECRET", "POSTGRES_PASSWORD", "REDIS_PASSWORD"), "x"
)
SERVICES = {
    "postgres",
    "redis",
    "web",
    "sweeper",
    "worker-io",
    "worker-gpu",
    "worker-cpu",
    "engine",
}


def compose_config(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "docker-compose", "-f", "docker-compose.yml", "--profile", "*", "config"],
        cwd=ROOT,
        env=env | {"HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_compose_accepts_the_file():
    result = compose_config(SECRETS)
    assert result.returncode == 0, result.stderr
    services = yaml.safe_load(result.stdout)["services"]
    assert set(services) >= SERVICES
    for name, service in services.items():
        one_shot = service.get("restart") == "no"
        assert one_shot or "healthcheck" in service, f"{name} has no health check"


@pytest.mark.parametrize("secret", sorted(SECRETS))
def test_compose_refuses_to_start_without_a_secret(secret):
    result = compose_config({key: value for key, value in SECRETS.items() if key != secret})
    assert result.returncode != 0
    assert secret in result.stderr


def test_hadolint_finds_nothing_in_the_dockerfile():
    result = subprocess.run(
        [BIN / "hadolint", "--failure-threshold", "style", "Dockerfile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_runs_in_a_container_is_not_root():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    users: dict[str, str] = {}
    for line in lines:
        if line.startswith("FROM "):
            _, base, _, stage = line.split()
            users[stage] = users.get(base, "0")
        elif line.startswith("USER "):
            users[stage] = line.split()[1]
    assert users["web"] == users["worker"] == "10001"
