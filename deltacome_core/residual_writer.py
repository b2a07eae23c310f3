"""Write the residual of a lossy delta."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltacome_core import __version__, strict_json
from deltacome_core.atomic import new_file
from deltacome_core.checkpoint import Checkpoint, checkpoint_digest, hash_tensors, open_checkpoint
from deltacome_core.container import Delta, open_delta
from deltacome_core.entries_json import entry_to_json
from deltacome_core.errors import UserError
from deltacome_core.lossless import ZSTD_VERSION, read_elements, slice_elements
from deltacome_core.lossless_spool import CodedSpool, equals_cast, open_spool
from deltacome_core.packed import CodedTensor
from deltacome_core.reconstruct import check_backbone, rebuild_tensor
from deltacome_core.residual import (
    FORMAT_NAME,
    FORMAT_VERSION,
    HEAD_TENSOR,
    delta_digest,
    row_count,
)
from deltacome_core.safetensors_file import TensorSource, write_safetensors


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualReport:
    """What was written; tensors that were exact already take no bytes."""

    path: Path
    size_bytes: int
    n_coded: int
    n_exact: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


def _check_fine_tune(tuned: Checkpoint, delta: Delta) -> dict[str, str]:
    hashes = hash_tensors(tuned)
    expected, found = delta.manifest.fine_tune.digest, checkpoint_digest(tuned.layout, hashes)
    if found != expected:
        raise UserError("fine_tune_mismatch", expected=expected[:12], found=found[:12])
    return hashes


def _code(
    spool: CodedSpool, base: Checkpoint, tuned: Checkpoint, delta: Delta, name: str, sha256: str
) -> CodedTensor | None:
    entry = delta.entry(name)
    rebuilt = slice_elements(rebuild_tensor(base, delta, name))
    n_elements = tuned.tensors[name].info.n_params
    if equals_cast(rebuilt, read_elements(tuned, name), entry.dtype, n_elements):
        return None
    return spool.encode(name, tuned, rebuilt, base_rows=row_count(entry.shape), sha256=sha256)


def _sources(delta: Delta, coded: list[CodedTensor]) -> list[TensorSource]:
    head = strict_json.dumps_canonical(
        {
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "delta": delta_digest(delta.folder.path),
            "entries": [entry_to_json(tensor.entry) for tensor in coded],
            "tools": {"deltacome": __version__, "zstd": ZSTD_VERSION},
        }
    )
    sources: list[TensorSource] = [(HEAD_TENSOR, "U8", (len(head),), head)]
    return sources + [
        (f"coded.{tensor.name}", "U8", (tensor.size_bytes,), tensor.chunks()) for tensor in coded
    ]


def write_residual(
    base_dir: Path,
    tuned_dir: Path,
    delta_dir: Path,
    out: Path,
    *,
    on_tensor: Callable[[str], None] | None = None,
) -> ResidualReport:
    """Write what a delta lost, so that both together give the fine-tune bit for bit.

    Args:
        base_dir: checkpoint folder of the backbone.
        tuned_dir: checkpoint folder of the fine-tune.
        delta_dir: the delta between them.
        out: file to create; it appears whole or not at all.
        on_tensor: called with each name once it is coded.

    Returns:
        What was written.

    Raises:
        UserError: output_exists, backbone_digest_mismatch, fine_tune_mismatch, and everything
            open_checkpoint and open_delta raise.
    """
    base, tuned = open_checkpoint(base_dir), open_checkpoint(tuned_dir)
    delta = open_delta(delta_dir)
    with new_file(out) as temporary, open_spool(temporary.parent) as spool:
        check_backbone(base, delta)
        hashes = _check_fine_tune(tuned, delta)
        coded = []
        for name in delta.names:
            tensor = _code(spool, base, tuned, delta, name, hashes[name])
            if tensor is not None:
                coded.append(tensor)
            if on_tensor is not None:
                on_tensor(name)
        metadata = {"format": FORMAT_NAME, "format_version": str(FORMAT_VERSION)}
        size_bytes = write_safetensors(temporary, _sources(delta, coded), metadata)
    return ResidualReport(
        path=out, size_bytes=size_bytes, n_coded=len(coded), n_exact=len(delta.names) - len(coded)
    )
