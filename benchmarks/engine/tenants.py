"""A backbone with deltas in its slots, as the engine serves them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from kernels.fragments import PRECISIONS
from workers.engine.arena_slots import KernelOptions
from workers.engine.model import LoadedModel, load_backbone, load_shared, share_backbone

FACTOR_BYTES = 1 << 28
BACKBONE = "backbone"


def share_tenants(
    base: Path,
    deltas: Mapping[str, Path],
    *,
    device: str,
    precision: str,
    n_slots: int,
    kv_bytes: int,
    delta_bytes: int,
) -> dict[str, LoadedModel]:
    """The backbone and all deltas in one executor, by name; precision is that of the kernels."""
    shared = share_backbone(
        load_backbone(base, device=device),
        base,
        kv_bytes=kv_bytes,
        n_slots=n_slots,
        delta_bytes=delta_bytes,
        kernels=KernelOptions(planes=PRECISIONS[precision]),
    )
    models = {BACKBONE: replace(shared, key=BACKBONE)}
    for name, folder in deltas.items():
        model = load_shared(shared, base, folder, factor_bytes=FACTOR_BYTES)
        if model is None:
            raise RuntimeError(f"{name} is not shared")
        models[name] = replace(model, key=name)
    return models
