"""Settings of the workers, read from the environment once."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from workers.env import envfloat, envint


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Limits of a child; 0 bytes mean none."""

    device: str
    child_address_bytes: int
    child_file_bytes: int
    step_timeout_s: float


def read_config(env: Mapping[str, str] = os.environ) -> WorkerConfig:
    return WorkerConfig(
        device=env.get("WORKER_DEVICE", "auto"),
        child_address_bytes=envint("CHILD_ADDRESS_BYTES", 0, env=env),
        child_file_bytes=envint("CHILD_FILE_BYTES", 0, env=env),
        step_timeout_s=envfloat("STEP_TIMEOUT_S", 24 * 3600.0, env=env),
    )
