"""What a backbone and its deltas take of a GPU, from their files alone; no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltacome_core.checkpoint import Checkpoint, open_checkpoint
from deltacome_core.delta_folder import open_folder
from deltacome_core.entries import backbone_shape, needs_backbone
from deltacome_core.errors import UserError

GIGABYTE = 10**9
# Codes in operand order, room for deltas that differ a little, vocabularies filled up to one rank.
_RESIDENT_SHARE = 1.04
# A context, captured graphs, unfolded factors of two sites, activations of prompts: between what
# was seen beyond the rest with 64 deltas on a backbone of 7B while they decoded, 3.2 GB, and after
# prompts of 2,048 tokens, 5.3 GB (docs/benchmarks/engine.json).
_WORKSPACE_BYTES = 4_500_000_000
# Weights, keys and values are computed with in bf16 or fp16.
_ITEM_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Bytes on the device; `delta_bytes` of each of the deltas, or their mean."""

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

    def count_fitting(self, card_bytes: int) -> int | None:
        """Say how many deltas of this size fit.

        Args:
            card_bytes: memory of the card.

        Returns:
            Their number; 0 where not even backbone, keys and values, and workspace fit; None where
            the deltas have no bytes, so that any number fits.
        """
        if not self.delta_bytes:
            return None
        room = card_bytes - self.backbone_bytes - self.kv_bytes - self.workspace_bytes
        return max(0, room // self.delta_bytes)

    def to_json(self) -> dict[str, int]:
        return asdict(self) | {"total_bytes": self.total_bytes}


def forecast(
    stored_bytes: Sequence[int], *, backbone_bytes: int, n_deltas: int, kv_bytes: int
) -> Forecast:
    """Forecast the memory of deltas like these.

    Args:
        stored_bytes: size of the data files of each delta known, at least one.
        backbone_bytes: of the backbone's weights as they are computed with.
        n_deltas: how many are resident.
        kv_bytes: given to keys and values.

    Returns:
        The forecast for deltas of their mean size.
    """
    mean = sum(stored_bytes) / len(stored_bytes)
    return Forecast(
        backbone_bytes=backbone_bytes,
        delta_bytes=int(mean * _RESIDENT_SHARE),
        n_deltas=n_deltas,
        kv_bytes=kv_bytes,
        workspace_bytes=_WORKSPACE_BYTES,
    )


def served_bytes(n_params: int) -> int:
    """Count the bytes of a backbone as a server holds it, in 16 bits.

    Args:
        n_params: of the backbone.

    Returns:
        Bytes on the device.
    """
    return n_params * _ITEM_BYTES


def kv_bytes_per_token(config: Mapping[str, Any]) -> int:
    """Count what keys and values of one token take, all layers, in 16 bits.

    Layers that only look back a window are counted as if they kept every token.

    Args:
        config: of the model, config.json; of a vision-language model its `text_config` counts.

    Returns:
        Bytes.

    Raises:
        UserError: not_a_checkpoint, a number is missing or no positive whole number.
    """
    config = config.get("text_config", config)

    def read(*names: str) -> int:
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            reason = f"{names[0]} is not a positive whole number"
            raise UserError("not_a_checkpoint", path="config.json", reason=reason)
        return value

    n_heads = read("num_attention_heads")
    n_kv_heads = read("num_key_value_heads", "num_attention_heads")
    has_head_size = config.get("head_dim") is not None
    head_size = read("head_dim") if has_head_size else read("hidden_size") // n_heads
    return 2 * read("num_hidden_layers") * n_kv_heads * head_size * _ITEM_BYTES


def _check_shapes(base: Checkpoint, folder: Path) -> int:
    """Return the bytes of a delta's data files; refuse one of a backbone of another shape."""
    delta = open_folder(folder, verify_digests=False).manifest
    differing = [
        f"{entry.name}: expected {list(backbone_shape(entry))}"
        for entry in delta.entries
        if needs_backbone(entry)
        and (
            entry.name not in base.tensors
            or base.tensors[entry.name].info.shape != backbone_shape(entry)
        )
    ]
    if differing:
        raise UserError("backbone_mismatch", tensors=differing)
    return sum(delta.files[name].size_bytes for name in delta.data_files)


def forecast_files(base_dir: Path, delta_dirs: Sequence[Path], *, kv_tokens: int) -> Forecast:
    """Forecast the memory of a backbone with some deltas, from headers and manifests.

    Args:
        base_dir: checkpoint folder of the backbone.
        delta_dirs: folders of deltas of it, at least one.
        kv_tokens: tokens of all conversations at once.

    Returns:
        The forecast with as many deltas as were given.

    Raises:
        UserError: backbone_mismatch, not_a_checkpoint, delta_invalid and what opening raises.
    """
    base = open_checkpoint(base_dir)
    return forecast(
        [_check_shapes(base, folder) for folder in delta_dirs],
        backbone_bytes=served_bytes(base.n_params),
        n_deltas=len(delta_dirs),
        kv_bytes=kv_tokens * kv_bytes_per_token(base.config),
    )


def describe_forecast(found: Forecast, *, card_bytes: int) -> str:
    """Say a forecast as lines of a table.

    Args:
        found: the forecast.
        card_bytes: memory of the card.

    Returns:
        Text, gigabytes of 10^9 bytes.
    """
    free = card_bytes - found.total_bytes
    deltas = found.n_deltas * found.delta_bytes
    lines = [
        ("backbone", found.backbone_bytes),
        (f"{found.n_deltas} deltas", deltas),
        ("keys and values", found.kv_bytes),
        ("workspace", found.workspace_bytes),
        ("free" if free >= 0 else "missing", abs(free)),
    ]
    table = "\n".join(f"{name:<16}{size / GIGABYTE:>8.2f} GB" for name, size in lines)
    room = found.count_fitting(card_bytes)
    fits = "Any number of such deltas fits" if room is None else f"{room} such deltas fit"
    return f"{table}\n{fits} in {card_bytes / GIGABYTE:g} GB."
