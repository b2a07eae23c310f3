"""What a backbone and its deltas will take of a GPU, by their files alone."""

from dataclasses import asdict, dataclass
from pathlib import Path

from deltacome_core.manifest import read_manifest

# Codes in operand order, room for deltas that differ a little, vocabularies filled up to one rank.
_RESIDENT_SHARE = 1.04
# A context, captured graphs, unfolded factors of two sites, activations of a prompt: what was seen
# beyond the rest with 64 deltas on a backbone of 7B (docs/benchmarks/engine.json).
_WORKSPACE_BYTES = 3_700_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Bytes on the device; `delta_bytes` of each of the deltas."""

    backbone_bytes: int
    delta_bytes: int
    n_deltas: int
    kv_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        return (
            self.backbone_bytes
            + self.n_deltas * self.delta_bytes
            + self.kv_bytes
            + self.workspace_bytes
        )

    def to_json(self) -> dict[str, int]:
        return asdict(self) | {"total_bytes": self.total_bytes}


def forecast(delta: Path, *, backbone_bytes: int, n_deltas: int, kv_bytes: int) -> Forecast:
    """Forecast the memory of deltas like this one.

    Args:
        delta: folder of a delta.
        backbone_bytes: of the backbone's weights as they are computed with.
        n_deltas: how many are resident.
        kv_bytes: given to keys and values.
    """
    manifest = read_manifest(delta)
    stored = sum(manifest.files[name].size_bytes for name in manifest.data_files)
    return Forecast(
        backbone_bytes=backbone_bytes,
        delta_bytes=int(stored * _RESIDENT_SHARE),
        n_deltas=n_deltas,
        kv_bytes=kv_bytes,
        workspace_bytes=_WORKSPACE_BYTES,
    )
