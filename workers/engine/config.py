"""Settings of the engine, read from the environment once."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_MIN_SECRET_CHARS = 16


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

    def __post_init__(self) -> None:
        if len(self.secret) < _MIN_SECRET_CHARS:
            raise ValueError(f"ENGINE_SECRET must have at least {_MIN_SECRET_CHARS} characters")
        for name in ("memory_bytes", "max_sequences", "max_output_tokens", "prefill_chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive")


def read_config(env: Mapping[str, str] = os.environ) -> EngineConfig:
    data_dir = Path(env.get("DELTACOME_DATA_DIR", "data"))
    device = env.get("ENGINE_DEVICE") or _default_device()
    memory = env.get("ENGINE_MEMORY_BYTES")
    return EngineConfig(
        cache_dir=Path(env.get("ENGINE_CACHE_DIR") or data_dir / "engine").resolve(),
        secret=env.get("ENGINE_SECRET", ""),
        host=env.get("ENGINE_HOST", "127.0.0.1"),
        port=int(env.get("ENGINE_PORT", "8100")),
        device=device,
        memory_bytes=int(memory) if memory else _default_memory_bytes(device),
        max_sequences=int(env.get("ENGINE_MAX_SEQUENCES", "32")),
        max_output_tokens=int(env.get("ENGINE_MAX_OUTPUT_TOKENS", "4096")),
        prefill_chunk_tokens=int(env.get("ENGINE_PREFILL_CHUNK_TOKENS", "256")),
    )


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _default_memory_bytes(device: str) -> int:
    """Leave a third of the memory to KV caches, activations and the rest of the machine."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory * 2 // 3)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 2 // 3
