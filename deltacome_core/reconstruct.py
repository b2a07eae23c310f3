"""Rebuild a fine-tune from its backbone and a delta."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from deltacome_core.atomic import new_folder, write_file
from deltacome_core.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    Checkpoint,
    at_precision,
    check_config,
    checkpoint_digest,
    find_sidecars,
    hash_tensor,
    open_checkpoint,
    read_json_object,
)
from deltacome_core.container import Delta, open_delta
from deltacome_core.entries import CodedEntry, DeltaEntry, backbone_shape, needs_backbone
from deltacome_core.errors import InternalError, UserError
from deltacome_core.fields import invalid
from deltacome_core.lossless import decode_blocks, decode_tensor, read_elements
from deltacome_core.packed import CodedTensor, ExactTensor, PackedLinear, PackedStack, PackedTensor
from deltacome_core.residual import Residual, open_residual
from deltacome_core.safetensors_file import ITEM_BYTES, TensorSource, write_safetensors
from deltacome_core.shards import MAX_SHARD_BYTES
from deltacome_core.tensors import TORCH_DTYPES, as_float32, dtype_name, load_tensor, tensor_bytes

_DIGEST_CHARS_SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructReport:
    """What was written."""

    path: Path
    n_tensors: int
    size_bytes: int
    files: tuple[str, ...]


def apply_entry(
    base: torch.Tensor | None,
    packed: PackedTensor | None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Add a delta to one backbone tensor.

    Args:
        base: the backbone's tensor, or None when only the fine-tune has it.
        packed: the delta, or None when the tensor is unchanged.
        dtype: data type of the result; the backbone's by default.
        device: where to compute.

    Returns:
        base + delta, a scaled base if there is one, added in f32 and cast once; rows that did not
        change are only cast. On the
        CPU, with the same bits whatever the device or the number of threads.

    Raises:
        InternalError: the delta needs a base and there is none.

    Source: docs/format.md, "From codes to numbers".
    """
    if isinstance(packed, ExactTensor):
        return packed.value if dtype is None else packed.value.to(dtype)
    if isinstance(packed, CodedTensor):
        restored = decode_tensor(packed, base)
        return restored if dtype is None else restored.to(dtype)
    if base is None:
        raise InternalError("there is no backbone tensor to add to")
    target = base.dtype if dtype is None else dtype
    if packed is None:
        return base.to(target)
    if isinstance(packed, PackedLinear):
        delta = packed.to(device).dequantise()
        return (as_float32(base.to(device)) + delta).to(target).cpu()
    if isinstance(packed, PackedStack):
        return _add_slices(base, packed, target, device)
    result = base.to(target, copy=True)
    if packed.factor is not None:
        delta = packed.to(device).dequantise_changed().cpu()
        old = as_float32(base[packed.changed])
        if packed.base_scale is not None:
            old = old * packed.base_scale
        result[packed.changed] = (old + delta).to(target)
    return result if packed.new_rows is None else torch.cat([result, packed.new_rows.to(target)])


def _add_slices(
    base: torch.Tensor, stack: PackedStack, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """One slice at a time: in f32 the experts of a layer may be larger than a device."""
    result = torch.empty(base.shape, dtype=dtype)
    sources = base.reshape(-1, *base.shape[-2:])
    targets = result.view(sources.shape)
    for source, piece, target in zip(sources, stack.slices, targets, strict=True):
        delta = piece.to(device).dequantise()
        delta = delta.T if stack.transposed else delta
        target.copy_((as_float32(source.to(device)) + delta).to(dtype))
    return result


def check_backbone(base: Checkpoint, delta: Delta) -> None:
    """Make sure a checkpoint holds the weights a delta was made from.

    Args:
        base: the checkpoint to add to.
        delta: the delta.

    Raises:
        UserError: backbone_digest_mismatch, naming every tensor that is absent, of another shape
            or of other content.
    """
    record = delta.manifest.backbone
    differing = []
    for name, entry in delta.entries.items():
        if not needs_backbone(entry):
            continue
        at = base.tensors.get(name)
        fits = at is not None and at.info.shape == backbone_shape(entry)
        if not fits or hash_tensor(base, name) != record.tensors[name]:
            differing.append(name)
    if differing:
        expected = record.digest[:_DIGEST_CHARS_SHOWN]
        raise UserError("backbone_digest_mismatch", tensors=differing, expected=expected)


def rebuild_tensor(
    base: Checkpoint,
    delta: Delta,
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Rebuild one tensor of the fine-tune.

    Args:
        base: the backbone; what it is served as follows from the delta.
        delta: the delta.
        name: tensor name.
        dtype: data type for floating tensors; the fine-tune's by default.
        device: where to compute.

    Returns:
        The tensor on the CPU.

    Raises:
        UserError: tensor_missing, delta_invalid.
    """
    entry = delta.entry(name)
    served = at_precision(base, delta.manifest.backbone.precision)
    source = load_tensor(served, name) if needs_backbone(entry) else None
    target = TORCH_DTYPES[_output_dtype(entry, dtype)]
    return apply_entry(source, delta.load(name), dtype=target, device=device)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rebuild:
    """Tensors on their way into a checkpoint; hashes are kept when a residual promises them."""

    base: Checkpoint
    delta: Delta
    residual: Residual | None
    dtype: torch.dtype | None
    device: torch.device | str
    on_tensor: Callable[[str], None]
    hashes: dict[str, str]

    def write(self, folder: Path, max_shard_bytes: int) -> tuple[tuple[str, ...], int]:
        shards = _shards(self.delta.entries, self.dtype, max_shard_bytes)
        names = _shard_names(len(shards))
        size_bytes = 0
        for file, shard in zip(names, shards, strict=True):
            sources = [self._source(entry) for entry in shard]
            size_bytes += write_safetensors(folder / file, sources, {"format": "pt"})
        if len(shards) > 1:
            _write_index(folder, shards, names, size_bytes)
        return tuple(names), size_bytes

    def _source(self, entry: DeltaEntry) -> TensorSource:
        def chunks() -> Iterator[memoryview]:
            yield from self._chunks(entry)
            self.on_tensor(entry.name)

        return entry.name, _output_dtype(entry, self.dtype), entry.shape, chunks()

    def _chunks(self, entry: DeltaEntry) -> Iterator[memoryview]:
        if self.residual is not None:
            yield self._exact(entry, self.residual)
        elif isinstance(entry, CodedEntry) and _output_dtype(entry, self.dtype) == entry.dtype:
            reader = read_elements(self.base, entry.name) if needs_backbone(entry) else None
            yield from decode_blocks(self.delta.load_coded(entry), reader)
        else:
            yield tensor_bytes(
                rebuild_tensor(
                    self.base, self.delta, entry.name, dtype=self.dtype, device=self.device
                )
            )

    def _exact(self, entry: DeltaEntry, residual: Residual) -> memoryview:
        lossy = rebuild_tensor(self.base, self.delta, entry.name, device=self.device)
        tensor = residual.restore(entry.name, lossy)
        self.hashes[entry.name] = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        return tensor_bytes(tensor.to(TORCH_DTYPES[_output_dtype(entry, self.dtype)]))

    def check_exact(self) -> None:
        if self.residual is None:
            return
        layout = {name: (entry.dtype, entry.shape) for name, entry in self.delta.entries.items()}
        if checkpoint_digest(layout, self.hashes) != self.delta.manifest.fine_tune.digest:
            raise invalid("delta and residual together do not give the fine-tune's weights")


def _output_dtype(entry: DeltaEntry, dtype: torch.dtype | None) -> str:
    is_floating = TORCH_DTYPES[entry.dtype].is_floating_point
    return dtype_name(dtype) if dtype is not None and is_floating else entry.dtype


def _shards(
    entries: dict[str, DeltaEntry], dtype: torch.dtype | None, max_bytes: int
) -> list[list[DeltaEntry]]:
    shards: list[list[DeltaEntry]] = []
    room = 0
    for entry in entries.values():
        size_bytes = prod(entry.shape) * ITEM_BYTES[_output_dtype(entry, dtype)]
        if not shards or size_bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(entry)
        room -= size_bytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_index(folder: Path, shards: list[list[DeltaEntry]], names: list[str], size: int) -> None:
    weight_map = {
        entry.name: file for file, shard in zip(names, shards, strict=True) for entry in shard
    }
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_file(folder / INDEX_NAME, json.dumps(index, indent=2).encode() + b"\n")


def _copy_sidecars(delta: Delta, folder: Path, dtype: torch.dtype | None) -> None:
    listed = delta.manifest.files
    for path in find_sidecars(delta.folder.path):
        # A file the manifest does not name was not part of what the maker hashed.
        if path.name in listed and path.name != CONFIG_NAME:
            shutil.copyfile(path, folder / path.name)
    if CONFIG_NAME not in listed:
        raise UserError("file_missing", file=CONFIG_NAME)
    config = read_json_object(delta.folder.path / CONFIG_NAME, code="not_a_checkpoint")
    check_config(config, file=CONFIG_NAME)
    if dtype is None:
        shutil.copyfile(delta.folder.path / CONFIG_NAME, folder / CONFIG_NAME)
        return
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = str(dtype).removeprefix("torch.")
    write_file(folder / CONFIG_NAME, json.dumps(config, indent=2).encode() + b"\n")


def reconstruct_checkpoint(
    base_dir: Path,
    delta_dir: Path,
    out_dir: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    residual: Path | None = None,
    on_tensor: Callable[[str], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ReconstructReport:
    """Write the fine-tune as a checkpoint folder, one tensor in memory at a time.

    Args:
        base_dir: the backbone's checkpoint folder.
        delta_dir: the delta folder.
        out_dir: folder to create; it appears whole or not at all.
        dtype: data type for floating tensors; the fine-tune's by default.
        device: where to compute.
        residual: file that makes the result exact; see write_residual.
        on_tensor: called with each name once its data are in the file.
        max_shard_bytes: weights beyond this go into a further file.

    Returns:
        What was written.

    Raises:
        UserError: output_exists, backbone_digest_mismatch, and everything open_checkpoint,
            open_delta and open_residual raise.
    """
    base = open_checkpoint(base_dir)
    delta = open_delta(delta_dir)
    work = _Rebuild(
        base=base,
        delta=delta,
        residual=None if residual is None else open_residual(residual, delta),
        dtype=dtype,
        device=device,
        on_tensor=on_tensor or (lambda _name: None),
        hashes={},
    )
    with new_folder(out_dir) as folder:
        check_backbone(base, delta)
        _copy_sidecars(delta, folder, dtype)
        names, size_bytes = work.write(folder, max_shard_bytes)
        work.check_exact()
    return ReconstructReport(
        path=out_dir, n_tensors=len(delta.entries), size_bytes=size_bytes, files=names
    )
