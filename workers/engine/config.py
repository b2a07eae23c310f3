"""Settings of the engine, read from the environment once."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kernels.fragments import PRECISIONS
from workers.env import envint

# The hub keeps its data here too when nobody says where.
SOURCE_DIR = Path(__file__).resolve().parents[2]
_MIN_SECRET_CHARS = 16
_POSITIVE = (
    "memory_bytes",
    "kv_bytes",
    "max_sequences",
    "max_running",
    "max_waiting",
    "max_waiting_tenant",
    "max_resident",
    "max_output_tokens",
    "prefill_chunk_tokens",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    cache_dir: Path
    secret: str
    host: str
    port: int
    device: str
    memory_bytes: int
    max_sequences: int
    max_output_tokens: int
    prefill_chunk_tokens: int
    kv_bytes: int = 1 << 28
    max_running: int = 128
    max_waiting: int = 256
    max_waiting_tenant: int = 64
    max_resident: int = 256
    load_timeout_s: float = 300
    drain_s: float = 30
    pinned: frozenset[str] = frozenset()
    precision: str = "exact"

    def __post_init__(self) -> None:
        if len(self.secret) < _MIN_SECRET_CHARS:
            raise ValueError(f"ENGINE_SECRET must have at least {_MIN_SECRET_CHARS} characters")
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive")
        if self.precision not in PRECISIONS:
            known = " or ".join(PRECISIONS)
            raise ValueError(f"ENGINE_PRECISION must be {known}, found {self.precision!r}")
        if self.load_timeout_s <= 0 or self.drain_s < 0:
            raise ValueError("load_timeout_s must be positive, drain_s not negative")


def read_config(env: Mapping[str, str] = os.environ) -> EngineConfig:
    data_dir = Path(env.get("DELTACOME_DATA_DIR") or SOURCE_DIR / "var")
    device = env.get("ENGINE_DEVICE") or _default_device()
    return EngineConfig(
        cache_dir=Path(env.get("ENGINE_CACHE_DIR") or data_dir / "engine").resolve(),
        secret=env.get("ENGINE_SECRET", ""),
        host=env.get("ENGINE_HOST", "127.0.0.1"),
        port=envint("ENGINE_PORT", 8100, env=env),
        device=device,
        memory_bytes=envint("ENGINE_MEMORY_BYTES", 0, env=env)
        if env.get("ENGINE_MEMORY_BYTES")
        else _default_memory_bytes(device),
        max_sequences=envint("ENGINE_MAX_SEQUENCES", 32, env=env),
        max_output_tokens=envint("ENGINE_MAX_OUTPUT_TOKENS", 4096, env=env),
        prefill_chunk_tokens=envint("ENGINE_PREFILL_CHUNK_TOKENS", 256, env=env),
        kv_bytes=envint("ENGINE_KV_BYTES", 0, env=env)
        if env.get("ENGINE_KV_BYTES")
        else _default_kv_bytes(device),
        max_running=envint("ENGINE_MAX_RUNNING", 128, env=env),
        max_waiting=envint("ENGINE_MAX_WAITING", 256, env=env),
        max_waiting_tenant=envint("ENGINE_MAX_WAITING_TENANT", 64, env=env),
        max_resident=envint("ENGINE_MAX_RESIDENT", 256, env=env),
        load_timeout_s=envint("ENGINE_LOAD_TIMEOUT_S", 300, env=env),
        drain_s=envint("ENGINE_DRAIN_S", 30, env=env),
        precision=env.get("ENGINE_PRECISION") or "exact",
        pinned=frozenset(env.get("ENGINE_PINNED", "").replace(",", " ").split()),
    )


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _default_memory_bytes(device: str) -> int:
    """Leave a third of the memory to the cache, activations and the rest of the machine."""
    return _memory_bytes(device) * 2 // 3


def _default_kv_bytes(device: str) -> int:
    """A fifth of a GPU; an eighth of a machine, which has other work."""
    return _memory_bytes(device) // (5 if device.startswith("cuda") else 8)


def _memory_bytes(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
