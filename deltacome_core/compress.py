"""Compress a fine-tune into a delta, layer by layer, resuming where a killed run stopped."""

import hashlib
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deltacome_core import __version__, strict_json
from deltacome_core.calibrate import (
    SEQUENCE_TOKENS,
    CalibrationTokens,
    LayerCalibrator,
    read_calibration,
)
from deltacome_core.checkpoint import Checkpoint, open_checkpoint
from deltacome_core.delta import (
    ScannedCheckpoint,
    TensorKind,
    TensorPair,
    check_backbone,
    load_pair,
    scan_checkpoint,
)
from deltacome_core.entries import REST_GROUP, UnchangedEntry, group_of
from deltacome_core.errors import UserError
from deltacome_core.factorise import NamedDelta
from deltacome_core.inspection import inspect_delta
from deltacome_core.layout import RankBand
from deltacome_core.lossless import ZSTD_VERSION
from deltacome_core.lossless_spool import CodedSpool, code_tensor, open_spool
from deltacome_core.manifest import (
    BackboneRecord,
    CalibrationRecord,
    DeltaManifest,
    FineTuneRecord,
    RecipeRecord,
)
from deltacome_core.matrices import is_quantised, plan_stack, quantise_matrices
from deltacome_core.models import find_max_positions, load_tokenizer, resolve_device
from deltacome_core.moments import SharedHessian
from deltacome_core.packed import ExactTensor, PackedLinear, PackedTensor
from deltacome_core.parts import read_part, write_delta, write_part
from deltacome_core.recipe import Recipe
from deltacome_core.slices import SlicedTensor, slice_tensor
from deltacome_core.texts import DEFAULT_CALIBRATION
from deltacome_core.vocabulary import pack_vocabulary

_MATRIX_DIMENSIONS = 2
CALIBRATION_NAMES = ("calibration.jsonl", "calibration.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDone:
    """Progress: one layer is on disk; relative_error is the mean over its low-rank matrices."""

    group: str
    index: int
    n_layers: int
    n_matrices: int
    relative_error: float
    seconds: float
    resumed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressReport:
    """What a compression made and what it cost; sizes count the whole delta.

    n_matrices counts the quantised matrices, each slice of a stack as one; with_feedback of them
    were quantised with the Hessian of their input, the others by rounding alone.
    """

    out: Path
    seconds: float
    peak_host_bytes: int
    peak_gpu_bytes: int
    total_bytes: int
    ratio: float
    bits_per_param: float
    n_params: int
    entries: dict[str, int]
    n_matrices: int
    with_feedback: int
    calibration: CalibrationRecord | None
    resumed_layers: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """The tensors of one part: a decoder layer, or everything outside the layers."""

    group: str
    names: tuple[str, ...]
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    base: ScannedCheckpoint
    tuned: ScannedCheckpoint
    recipe: Recipe
    device: torch.device
    fingerprint: str

    def is_unchanged(self, name: str) -> bool:
        same_type = self.base.checkpoint.layout.get(name) == self.tuned.checkpoint.layout[name]
        return same_type and self.base.hashes[name] == self.tuned.hashes[name]

    def is_changed_matrix(self, name: str) -> bool:
        _, shape = self.tuned.checkpoint.layout[name]
        return len(shape) >= _MATRIX_DIMENSIONS and not self.is_unchanged(name)


def find_calibration(tuned_dir: Path) -> Path:
    """Choose the calibration text: the fine-tune's own when it brings one, else the default.

    Args:
        tuned_dir: folder of the fine-tune.

    Returns:
        Path of an existing file.
    """
    own = [tuned_dir / name for name in CALIBRATION_NAMES if (tuned_dir / name).is_file()]
    return own[0] if own else DEFAULT_CALIBRATION


def parts_folder(out_dir: Path) -> Path:
    """Return where finished layers wait until the delta is whole.

    Args:
        out_dir: folder that the delta will have.

    Returns:
        A hidden sibling of out_dir.
    """
    return out_dir.with_name(f".{out_dir.name}.parts")


def compress_checkpoint(
    base_dir: Path,
    tuned_dir: Path,
    out_dir: Path,
    recipe: Recipe,
    *,
    calibration: Path | None = None,
    device: str = "cpu",
    on_layer: Callable[[LayerDone], None] | None = None,
) -> CompressReport:
    """Compress a fine-tune into a delta folder.

    Finished layers are kept beside out_dir, under a fingerprint of both checkpoints, the recipe,
    the calibration text, the device and the versions. A run that was killed continues after the
    last of them and writes the bytes an undisturbed run would have written.

    Args:
        base_dir: checkpoint folder of the backbone.
        tuned_dir: checkpoint folder of the fine-tune.
        out_dir: folder to create; it appears whole or not at all.
        recipe: rank bands and quantiser.
        calibration: .txt or .jsonl file; by default the fine-tune's own, else the built-in text.
        device: "cpu" or "cuda".
        on_layer: told about each layer once it is on disk.

    Returns:
        Sizes, time and peak memory.

    Raises:
        UserError: output_exists, backbone_mismatch, nan_weights, calibration_too_short,
            model_not_runnable, device_unavailable, and what opening the checkpoints raises.

    Source: Delta-CoMe (arXiv 2406.08903).
    """
    started = time.monotonic()
    target = resolve_device(device)
    if out_dir.exists():
        raise UserError("output_exists", path=str(out_dir))
    base, tuned = open_checkpoint(base_dir), open_checkpoint(tuned_dir)
    check_backbone(base, tuned)
    tokens = _read_tokens(base, tuned, calibration) if recipe.calibrated else None
    if target.type == "cuda":
        torch.cuda.reset_peak_memory_stats(target)
    scanned = scan_checkpoint(base), scan_checkpoint(tuned)
    fingerprint = _fingerprint(*scanned, recipe=recipe, tokens=tokens, device=target)
    work = _Work(
        base=scanned[0], tuned=scanned[1], recipe=recipe, device=target, fingerprint=fingerprint
    )
    folder = parts_folder(out_dir)
    units = _plan_units(tuned, _open_parts(folder, fingerprint))
    resumed = _write_parts(work, units, tokens, on_layer or (lambda _done: None))
    parts = [unit.path for unit in units]
    with_feedback = sum(read_part(path).with_feedback for path in parts)
    head = _head(work, tokens, with_feedback)
    write_delta(out_dir, parts, head=head, sidecars=tuned.sidecars)
    shutil.rmtree(folder)
    seconds = time.monotonic() - started
    return _report(out_dir, seconds=seconds, device=target, resumed_layers=resumed)


def _read_tokens(
    base: Checkpoint, tuned: Checkpoint, calibration: Path | None
) -> CalibrationTokens:
    return read_calibration(
        calibration or find_calibration(tuned.path),
        load_tokenizer(tuned.path, base.path),
        max_positions=find_max_positions(tuned.config, default=SEQUENCE_TOKENS),
    )


def _fingerprint(
    base: ScannedCheckpoint,
    tuned: ScannedCheckpoint,
    *,
    recipe: Recipe,
    tokens: CalibrationTokens | None,
    device: torch.device,
) -> str:
    identity = {
        "backbone": base.digest,
        "fine_tune": tuned.digest,
        "recipe": asdict(recipe),
        "calibration": None if tokens is None else [tokens.sha256, tokens.digest],
        "device": device.type,
        "tools": _tools(recipe),
    }
    return hashlib.sha256(strict_json.dumps_canonical(identity)).hexdigest()


def _tools(recipe: Recipe) -> dict[str, str]:
    tools = {"deltacome": __version__, "torch": str(torch.__version__)}
    return tools | {"zstd": ZSTD_VERSION} if recipe.method == "lossless" else tools


def _open_parts(folder: Path, fingerprint: str) -> Path:
    """Make the folder for parts; those of other inputs will never be asked for again."""
    own = folder / fingerprint
    if folder.is_dir():
        for stale in folder.iterdir():
            if stale != own:
                shutil.rmtree(stale)
    own.mkdir(parents=True, exist_ok=True)
    return own


def _plan_units(tuned: Checkpoint, folder: Path) -> list[_Unit]:
    groups: dict[str, list[str]] = {}
    for name in sorted(tuned.tensors):
        groups.setdefault(group_of(name), []).append(name)

    def layer_order(group: str) -> tuple[str, int]:
        prefix, _, number = group.rpartition(".")
        return (prefix, int(number)) if number.isdigit() else (group, -1)

    return [
        _Unit(group=group, names=tuple(groups[group]), path=folder / f"{index:05d}.safetensors")
        for index, group in enumerate(sorted(groups, key=layer_order))
    ]


def _write_parts(
    work: _Work,
    units: Sequence[_Unit],
    tokens: CalibrationTokens | None,
    on_layer: Callable[[LayerDone], None],
) -> int:
    """Write the parts that are missing, calibrated layers first; return how many were there."""
    place = {unit.group: index for index, unit in enumerate(units)}
    pending = {unit.group: unit for unit in units if not unit.path.is_file()}

    def announce(unit: _Unit, errors: Sequence[float], started: float, *, resumed: bool) -> None:
        on_layer(
            LayerDone(
                group=unit.group,
                index=place[unit.group],
                n_layers=len(units),
                n_matrices=len(errors),
                relative_error=sum(errors) / len(errors) if errors else 0.0,
                seconds=time.monotonic() - started,
                resumed=resumed,
            )
        )

    def write(unit: _Unit, hessians: Sequence[SharedHessian]) -> None:
        started = time.monotonic()
        with open_spool(unit.path.parent) as spool:
            if work.recipe.method == "lossless":
                made = _code_unit(work, unit, spool)
            else:
                made = _compress_unit(work, unit, hessians)
            write_part(
                unit.path,
                made.tensors,
                layout=work.tuned.checkpoint.layout,
                fingerprint=work.fingerprint,
                with_feedback=made.with_feedback,
            )
        del pending[unit.group]
        announce(unit, made.errors, started, resumed=False)

    resumed = [unit for unit in units if unit.group not in pending]
    for unit in resumed:
        read_part(unit.path)
        announce(unit, (), time.monotonic(), resumed=True)
    for group, hessians in _walk_layers(work, pending, tokens):
        write(pending[group], hessians)
    for unit in list(pending.values()):
        write(unit, ())
    return len(resumed)


def _walk_layers(
    work: _Work, pending: dict[str, _Unit], tokens: CalibrationTokens | None
) -> Iterator[tuple[str, tuple[SharedHessian, ...]]]:
    """Yield the Hessians of each layer that is pending and changed, then stop the model early."""
    matrices = {
        group
        for group, unit in pending.items()
        if group != REST_GROUP and any(work.is_changed_matrix(name) for name in unit.names)
    }
    if tokens is None or not matrices:
        return
    calibrator = LayerCalibrator(work.tuned.checkpoint.path, tokens, work.device)

    def is_wanted(names: set[str]) -> bool:
        return any(group_of(name) in matrices for name in names)

    for hessians in calibrator.layers(is_wanted):
        groups = {group_of(name) for shared in hessians for name in shared.weights}
        for group in sorted(groups & matrices):
            yield group, hessians
        matrices -= groups
        if not matrices:
            return


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compressed:
    tensors: list[PackedTensor | UnchangedEntry]
    errors: list[float]
    with_feedback: int


def _compress_unit(work: _Work, unit: _Unit, hessians: Sequence[SharedHessian]) -> _Compressed:
    packed: list[PackedTensor | UnchangedEntry] = []
    sliced: list[SlicedTensor] = []
    deltas: dict[str, NamedDelta] = {}
    bands: dict[str, tuple[RankBand, ...]] = {}
    flipped = {name for shared in hessians if shared.transposed for name in shared.weights}
    for name in unit.names:
        dtype, shape = work.tuned.checkpoint.layout[name]
        unchanged = UnchangedEntry(name=name, dtype=dtype, shape=shape)
        if work.is_unchanged(name):
            packed.append(unchanged)
            continue
        pair = load_pair(work.base.checkpoint, work.tuned.checkpoint, name)
        kind = pair.kind
        if kind is TensorKind.LOWRANK:
            tensor = slice_tensor(name, shape, flipped)
            if is_quantised(tensor.matrix_shape, work.recipe):
                sliced.append(tensor)
                slices = tensor.split(pair.difference())
                deltas |= {each.name: each for each in slices}
                if len(slices) > 1:
                    bands |= _plan_slices(slices, work)
                continue
        packed.append(unchanged if kind is TensorKind.UNCHANGED else _pack_whole(pair, work))
    matrices: dict[str, PackedLinear] = {}
    errors: list[float] = []
    with_feedback = 0
    for names, hessian in _share_inputs(tuple(deltas), hessians):
        members = [deltas.pop(name).to(work.device) for name in names]
        with_feedback += 0 if hessian is None else len(members)
        for made in quantise_matrices(members, work.recipe, hessian=hessian, bands=bands):
            matrices[made.packed.name] = made.packed
            errors.append(made.relative_error)
    packed += [tensor.join(matrices) for tensor in sliced]
    return _Compressed(tensors=packed, errors=errors, with_feedback=with_feedback)


def _plan_slices(slices: Sequence[NamedDelta], work: _Work) -> dict[str, tuple[RankBand, ...]]:
    plan = plan_stack([each.delta.to(work.device) for each in slices], work.recipe)
    return {} if plan is None else {each.name: plan for each in slices}


def _code_unit(work: _Work, unit: _Unit, spool: CodedSpool) -> _Compressed:
    base, tuned = work.base.checkpoint, work.tuned.checkpoint
    coded: list[PackedTensor | UnchangedEntry] = [
        UnchangedEntry(name=name, dtype=tuned.layout[name][0], shape=tuned.layout[name][1])
        if work.is_unchanged(name)
        else code_tensor(spool, base, tuned, name, sha256=work.tuned.hashes[name])
        for name in unit.names
    ]
    return _Compressed(tensors=coded, errors=[], with_feedback=0)


def _pack_whole(pair: TensorPair, work: _Work) -> PackedTensor:
    if pair.kind is TensorKind.ROWS and pair.base is not None:
        return pack_vocabulary(pair.name, pair.base, pair.tuned, work.recipe, device=work.device)
    return ExactTensor(name=pair.name, value=pair.tuned)


def _share_inputs(
    names: Sequence[str], hessians: Sequence[SharedHessian]
) -> Iterator[tuple[list[str], torch.Tensor | None]]:
    """Yield matrices with one input together, then each of the others alone."""
    left = dict.fromkeys(names)
    for shared in hessians:
        members = [name for name in shared.weights if name in left]
        for name in members:
            del left[name]
        if members:
            yield members, shared.hessian
    for name in left:
        yield [name], None


def _head(work: _Work, tokens: CalibrationTokens | None, with_feedback: int) -> DeltaManifest:
    tuned = work.tuned.checkpoint
    return DeltaManifest(
        recipe=RecipeRecord(name=work.recipe.name, settings=work.recipe.settings),
        backbone=BackboneRecord(digest=work.base.digest, tensors=work.base.hashes),
        fine_tune=FineTuneRecord(
            digest=work.tuned.digest,
            size_bytes=tuned.size_bytes,
            dtype=tuned.dtype,
            n_params=tuned.n_params,
            architecture=tuned.architecture,
        ),
        entries=(),
        files={},
        tools=_tools(work.recipe),
        calibration=None if tokens is None else tokens.record(n_matrices=with_feedback),
    )


def _report(
    out_dir: Path, *, seconds: float, device: torch.device, resumed_layers: int
) -> CompressReport:
    inspected = inspect_delta(out_dir)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    is_cuda = device.type == "cuda"
    calibration = inspected.manifest.calibration
    return CompressReport(
        out=out_dir,
        seconds=seconds,
        # Linux counts in KiB, macOS in bytes.
        peak_host_bytes=peak if sys.platform == "darwin" else peak * 1024,
        peak_gpu_bytes=torch.cuda.max_memory_allocated(device) if is_cuda else 0,
        total_bytes=inspected.total_bytes,
        ratio=inspected.ratio,
        bits_per_param=inspected.bits_per_param,
        n_params=inspected.n_params,
        entries=inspected.entries_by_kind,
        n_matrices=inspected.n_matrices,
        with_feedback=0 if calibration is None else calibration.n_matrices,
        calibration=calibration,
        resumed_layers=resumed_layers,
    )
