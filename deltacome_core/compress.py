"""Compress a fine-tune into a delta, layer by layer, resuming where a killed run stopped."""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deltacome_core import __version__, strict_json
from deltacome_core.bands import Allowance
from deltacome_core.budget import Budget, fit_recipe
from deltacome_core.calibrate import SEQUENCE_TOKENS, CalibrationTokens, read_calibration
from deltacome_core.checkpoint import Checkpoint, at_precision, open_checkpoint
from deltacome_core.costs import HostPeak, Stages
from deltacome_core.delta import (
    ScannedCheckpoint,
    TensorKind,
    TensorPair,
    check_backbone,
    describe_subject,
    load_pair,
    scan_checkpoint,
)
from deltacome_core.distance import check_related
from deltacome_core.entries import UnchangedEntry
from deltacome_core.errors import UserError
from deltacome_core.factorise import NamedDelta
from deltacome_core.inspection import inspect_delta
from deltacome_core.layout import RankBand
from deltacome_core.lossless import ZSTD_VERSION
from deltacome_core.lossless_spool import CodedSpool, code_tensor
from deltacome_core.manifest import (
    BackboneRecord,
    CalibrationRecord,
    DeltaManifest,
    FineTuneRecord,
    RecipeRecord,
)
from deltacome_core.matrices import is_quantised, plan_stack, quantise_matrices
from deltacome_core.models import find_max_positions, load_tokenizer, resolve_devices
from deltacome_core.moments import SharedHessian
from deltacome_core.packed import ExactTensor, PackedLinear, PackedTensor
from deltacome_core.parts import read_part, write_delta
from deltacome_core.pipeline import read_ahead
from deltacome_core.precision import NATIVE, Precision, plan_precision
from deltacome_core.recipe import Recipe
from deltacome_core.slices import SlicedTensor, slice_tensor
from deltacome_core.texts import DEFAULT_CALIBRATION
from deltacome_core.units import (
    Compressed,
    LayerDone,
    Makers,
    Unit,
    Work,
    plan_units,
    read_order,
    write_parts,
)
from deltacome_core.vocabulary import VocabularyUse, pack_vocabulary

CALIBRATION_NAMES = ("calibration.jsonl", "calibration.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressReport:
    """What a compression made and what it cost; sizes count the whole delta.

    mode is "calibrated", "data-free" or "lossless". stages are seconds by stage: scan, calibrate,
    matrices (of which `wait` for reading), write, join; some run at once, so they do not add up.
    peak_host_bytes is anonymous memory: mapped files belong to the page cache. peak_gpu_bytes is
    what tensors took on the fullest device, peak_gpu_reserved_bytes what torch took from it for
    them; a CUDA context comes on top. n_matrices counts the quantised matrices, each slice of a
    stack as one; with_feedback of them were quantised with the Hessian of their input, the others
    by rounding alone.

    payload_bytes is that of the data files: 0 where the fine-tune equals the backbone.
    """

    out: Path
    mode: str
    seconds: float
    stages: dict[str, float]
    peak_host_bytes: int
    peak_gpu_bytes: int
    peak_gpu_reserved_bytes: int
    total_bytes: int
    payload_bytes: int
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


def compress_checkpoint(  # noqa: PLR0913 - what a run is asked for, each by name
    base_dir: Path,
    tuned_dir: Path,
    out_dir: Path,
    recipe: Recipe,
    *,
    budget: Budget | None = None,
    calibration: Path | None = None,
    device: str | Sequence[str] = "cpu",
    backbone_precision: str = NATIVE,
    force: bool = False,
    on_layer: Callable[[LayerDone], None] | None = None,
) -> CompressReport:
    """Compress a fine-tune into a delta folder.

    Finished layers are kept beside out_dir, under a fingerprint of both checkpoints, the recipe,
    the calibration text, the type of device and the versions. A run that was killed continues after
    the last of them and writes the bytes an undisturbed run would have written, on any number of
    devices.

    Args:
        base_dir: checkpoint folder of the backbone.
        tuned_dir: checkpoint folder of the fine-tune.
        out_dir: folder to create; it appears whole or not at all.
        recipe: rank bands and quantiser.
        budget: of the whole delta, met within 1 % from below; by default the recipe's own sizes.
        calibration: .txt or .jsonl file; by default the fine-tune's own, else the built-in text.
        device: "cpu" or "cuda", or several of one type, over which the layers are spread.
        backbone_precision: what the backbone will be served with, one of precision.PRECISIONS; the
            delta is then fine-tune minus served backbone, rounding errors included.
        force: go on where the weights say that the fine-tune comes from another backbone.
        on_layer: told about each layer once it is on disk, by one thread at a time.

    Returns:
        Sizes, time and peak memory.

    Raises:
        UserError: output_exists, backbone_mismatch, backbone_unrelated, nan_weights,
            calibration_too_short, model_not_runnable, device_unavailable, budget_impossible,
            budget_fixed, precision_unknown, precision_unusable, and what opening the checkpoints
            raises.

    Source: Delta-CoMe (arXiv 2406.08903).
    """
    started, stages = time.monotonic(), Stages()
    devices = resolve_devices(device)
    if out_dir.exists():
        raise UserError("output_exists", path=str(out_dir))
    with HostPeak() as host:
        for each in devices:
            if each.type == "cuda":
                torch.cuda.reset_peak_memory_stats(each)
        base, tuned = open_checkpoint(base_dir), open_checkpoint(tuned_dir)
        check_backbone(base, tuned)
        if not force:
            check_related(base, tuned)
        base = at_precision(base, _plan_precision(base, backbone_precision, recipe))
        tokens = _read_tokens(base, tuned, calibration) if recipe.calibrated else None
        with stages.measure("scan"):
            scanned = scan_checkpoint(base), scan_checkpoint(tuned)
        if budget is not None:
            recipe = fit_recipe(describe_subject(*scanned), recipe, budget)
        work = Work(
            base=scanned[0],
            tuned=scanned[1],
            recipe=recipe,
            device=devices[0],
            fingerprint=_fingerprint(*scanned, recipe=recipe, tokens=tokens, device=devices[0]),
            stages=stages,
            tokens=tokens,
        )
        folder = parts_folder(out_dir)
        units = plan_units(tuned, _open_parts(folder, work.fingerprint))
        resumed = write_parts(
            work,
            units,
            devices=devices,
            makers=Makers(compress=_compress_unit, code=_code_unit),
            on_layer=on_layer or (lambda _done: None),
        )
        with stages.measure("join"):
            parts = [unit.path for unit in units]
            head = _head(work, tokens, sum(read_part(path).with_feedback for path in parts))
            write_delta(out_dir, parts, head=head, sidecars=tuned.sidecars)
            shutil.rmtree(folder)
    seconds = time.monotonic() - started
    return _report(
        out_dir,
        seconds=seconds,
        stages=stages,
        host=host,
        devices=devices,
        mode=recipe.mode,
        resumed_layers=resumed,
    )


def _plan_precision(base: Checkpoint, name: str, recipe: Recipe) -> Precision | None:
    if name != NATIVE and recipe.method == "lossless":
        raise UserError("precision_unusable", reason="a lossless delta restores every bit anyway")
    return plan_precision(name, base.layout)


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
        "backbone_precision": _scheme(base.checkpoint),
        "fine_tune": tuned.digest,
        "recipe": asdict(recipe),
        "calibration": None if tokens is None else [tokens.sha256, tokens.digest],
        "device": device.type,
        "tools": _tools(recipe),
    }
    return hashlib.sha256(strict_json.dumps_canonical(identity)).hexdigest()


def _scheme(base: Checkpoint) -> str:
    return NATIVE if base.precision is None else base.precision.scheme


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


def _compress_unit(work: Work, unit: Unit, hessians: Sequence[SharedHessian]) -> Compressed:
    """Pack a unit, some tensors at a time: those that share an input, then the others."""
    made = Compressed(tensors=[], errors=[], with_feedback=0)
    changed = [name for name in unit.names if not work.is_unchanged(name)]
    rows = read_order(changed, hessians)
    allowance = Allowance()
    pairs = read_ahead((name for row in rows for name in row), partial(_load_pair, work))
    for row in rows:
        made = made.join(_compress_tensors(work, row, pairs, hessians, allowance))
    made.tensors.extend(_unchanged(work, name) for name in unit.names if work.is_unchanged(name))
    return made


def _load_pair(work: Work, name: str) -> tuple[TensorPair, TensorKind]:
    pair = load_pair(work.base.checkpoint, work.tuned.checkpoint, name)
    return pair, pair.kind


def _unchanged(work: Work, name: str) -> UnchangedEntry:
    dtype, shape = work.tuned.checkpoint.layout[name]
    return UnchangedEntry(name=name, dtype=dtype, shape=shape)


def _compress_tensors(
    work: Work,
    names: Sequence[str],
    pairs: Iterator[tuple[TensorPair, TensorKind]],
    hessians: Sequence[SharedHessian],
    allowance: Allowance,
) -> Compressed:
    packed: list[PackedTensor | UnchangedEntry] = []
    sliced: list[SlicedTensor] = []
    deltas: dict[str, NamedDelta] = {}
    bands: dict[str, tuple[RankBand, ...]] = {}
    flipped = {name for shared in hessians if shared.transposed for name in shared.weights}
    for name in names:
        _, shape = work.tuned.checkpoint.layout[name]
        with work.stages.measure("wait"):
            pair, kind = next(pairs)
        if kind is TensorKind.LOWRANK:
            tensor = slice_tensor(name, shape, flipped)
            if is_quantised(tensor.matrix_shape, work.recipe):
                sliced.append(tensor)
                slices = tensor.split(pair.to(work.device).difference())
                del pair
                deltas |= {each.name: each for each in slices}
                if len(slices) > 1:
                    bands |= _plan_slices(slices, work)
                continue
        packed.append(
            _unchanged(work, name)
            if kind is TensorKind.UNCHANGED
            else _pack_whole(pair, work, hessians)
        )
    matrices: dict[str, PackedLinear] = {}
    errors: list[float] = []
    with_feedback = 0
    for members, hessian in _share_inputs(tuple(deltas), hessians):
        sources = [deltas.pop(name) for name in members]
        own = None if hessian is None else hessian.to(work.device)
        with_feedback += 0 if hessian is None else len(sources)
        for made in quantise_matrices(
            sources, work.recipe, hessian=own, bands=bands, allowance=allowance
        ):
            matrices[made.packed.name] = made.packed
            errors.append(made.relative_error)
    packed += [tensor.join(matrices) for tensor in sliced]
    return Compressed(tensors=packed, errors=errors, with_feedback=with_feedback)


def _plan_slices(slices: Sequence[NamedDelta], work: Work) -> dict[str, tuple[RankBand, ...]]:
    plan = plan_stack([each.delta for each in slices], work.recipe)
    return {} if plan is None else {each.name: plan for each in slices}


def _code_unit(work: Work, unit: Unit, spool: CodedSpool) -> Compressed:
    base, tuned = work.base.checkpoint, work.tuned.checkpoint
    coded: list[PackedTensor | UnchangedEntry] = [
        UnchangedEntry(name=name, dtype=tuned.layout[name][0], shape=tuned.layout[name][1])
        if work.is_unchanged(name)
        else code_tensor(spool, base, tuned, name, sha256=work.tuned.hashes[name])
        for name in unit.names
    ]
    return Compressed(tensors=coded, errors=[], with_feedback=0)


def _pack_whole(pair: TensorPair, work: Work, hessians: Sequence[SharedHessian]) -> PackedTensor:
    if pair.kind is not TensorKind.ROWS or pair.base is None:
        return ExactTensor(name=pair.name, value=pair.tuned)
    use = None
    if work.tokens is not None:
        own = [shared.hessian for shared in hessians if pair.name in shared.weights]
        counts = work.tokens.count(len(pair.tuned))
        use = VocabularyUse(counts=counts, hessian=own[0] if own else None)
    return pack_vocabulary(
        pair.name, pair.base, pair.tuned, work.recipe, device=work.device, use=use
    )


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


def _head(work: Work, tokens: CalibrationTokens | None, with_feedback: int) -> DeltaManifest:
    tuned = work.tuned.checkpoint
    return DeltaManifest(
        recipe=RecipeRecord(name=work.recipe.name, settings=work.recipe.settings),
        backbone=BackboneRecord(
            digest=work.base.digest,
            tensors=work.base.hashes,
            precision=work.base.checkpoint.precision,
        ),
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
    out_dir: Path,
    *,
    seconds: float,
    stages: Stages,
    host: HostPeak,
    devices: Sequence[torch.device],
    mode: str,
    resumed_layers: int,
) -> CompressReport:
    inspected = inspect_delta(out_dir)
    cards = [device for device in devices if device.type == "cuda"]
    calibration = inspected.manifest.calibration
    return CompressReport(
        out=out_dir,
        mode=mode,
        seconds=seconds,
        stages=stages.seconds,
        peak_host_bytes=host.bytes,
        peak_gpu_bytes=max(map(torch.cuda.max_memory_allocated, cards), default=0),
        peak_gpu_reserved_bytes=max(map(torch.cuda.max_memory_reserved, cards), default=0),
        total_bytes=inspected.total_bytes,
        payload_bytes=inspected.payload_bytes,
        ratio=inspected.ratio,
        bits_per_param=inspected.bits_per_param,
        n_params=inspected.n_params,
        entries=inspected.entries_by_kind,
        n_matrices=inspected.n_matrices,
        with_feedback=0 if calibration is None else calibration.n_matrices,
        calibration=calibration,
        resumed_layers=resumed_layers,
    )
