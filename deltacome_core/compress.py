"""Compress a fine-tune into a delta, layer by layer, resuming where a killed run stopped."""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from deltacome_core import __version__, strict_json
from deltacome_core.budget import Budget, fit_recipe
from deltacome_core.calibrate import (
    CPU_SEQUENCES,
    MAX_SEQUENCES,
    SEQUENCE_TOKENS,
    CalibrationTokens,
    read_calibration,
)
from deltacome_core.checkpoint import Checkpoint, at_precision, open_checkpoint
from deltacome_core.compress_report import CompressReport, Meter, make_report
from deltacome_core.costs import Stages
from deltacome_core.delta import (
    ScannedCheckpoint,
    describe_subject,
    scan_checkpoint,
)
from deltacome_core.device_memory import naming_shortage
from deltacome_core.distance import check_related
from deltacome_core.distil import DistilReport, OnStep
from deltacome_core.distil_parts import distil_parts
from deltacome_core.errors import UserError
from deltacome_core.fit import check_backbone
from deltacome_core.lossless import ZSTD_VERSION
from deltacome_core.manifest import (
    BackboneRecord,
    DeltaManifest,
    FineTuneRecord,
    RecipeRecord,
)
from deltacome_core.models import find_max_positions, load_tokenizer, resolve_devices
from deltacome_core.pack_unit import code_unit, compress_unit
from deltacome_core.parts import read_part, write_delta
from deltacome_core.precision import NATIVE, Precision, plan_precision
from deltacome_core.recipe import Recipe
from deltacome_core.texts import DEFAULT_CALIBRATION
from deltacome_core.units import (
    LayerDone,
    Makers,
    Work,
    plan_units,
    write_parts,
)

CALIBRATION_NAMES = ("calibration.jsonl", "calibration.txt")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What a run is asked for beside its inputs."""

    budget: Budget | None
    calibration: Path | None
    backbone_precision: str
    force: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """Who is told how far a run is."""

    on_layer: Callable[[LayerDone], None]
    on_step: OnStep


@naming_shortage()
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
    on_step: OnStep | None = None,
) -> CompressReport:
    """Compress a fine-tune into a delta folder.

    Finished layers are kept beside out_dir, under a fingerprint of all inputs, the type of device
    and the versions. A run that was killed continues after the last of them and writes the bytes an
    undisturbed run would have written, on any number of devices.

    Args:
        base_dir: checkpoint folder of the backbone.
        tuned_dir: checkpoint folder of the fine-tune.
        out_dir: folder to create; it appears whole or not at all.
        recipe: rank bands and quantiser.
        budget: of the whole delta, met within 1 % from below; by default the recipe's own sizes.
        calibration: .txt or .jsonl file; by default the fine-tune's own, else the built-in text.
            On a GPU at most 262,144 tokens are read, on a CPU 16,384, half of them of the built-in
            text where the recipe asks for it.
        device: "cpu" or "cuda", or several of one type, over which the layers are spread.
        backbone_precision: one of PRECISIONS; the delta is fine-tune minus what is served.
        force: go on where the weights say that the fine-tune comes from another backbone.
        on_layer: told about each layer once it is on disk, by one thread at a time.
        on_step: told about each step of a recipe that trains, once all layers are on disk.

    Returns:
        Sizes, time and peak memory.

    Raises:
        UserError: output_exists, backbone_mismatch, backbone_unrelated, nan_weights,
            calibration_too_short, model_not_runnable, device_unavailable, device_memory_short,
            budget_impossible, budget_fixed, precision_unknown, precision_unusable, and those of
            open_checkpoint.

    Source: Delta-CoMe (arXiv 2406.08903).
    """
    asked = _Asked(
        budget=budget, calibration=calibration, backbone_precision=backbone_precision, force=force
    )
    meter, devices = Meter(), resolve_devices(device)
    if out_dir.exists():
        raise UserError("output_exists", path=str(out_dir))
    with meter.measuring(devices):
        pair = open_checkpoint(base_dir), open_checkpoint(tuned_dir)
        work = _open_work(*pair, recipe, asked, devices[0], meter.stages)
        told = _Told(on_layer=on_layer or _tell_nobody, on_step=on_step or _tell_nobody)
        resumed, distilled = _write(work, out_dir, devices, told, asked)
    return make_report(
        out_dir, meter, mode=work.recipe.mode, resumed_layers=resumed, distilled=distilled
    )


def _tell_nobody(*_done: object) -> None:
    pass


def _open_work(
    base: Checkpoint,
    tuned: Checkpoint,
    recipe: Recipe,
    asked: _Asked,
    device: torch.device,
    stages: Stages,
) -> Work:
    check_backbone(base, tuned)
    if not asked.force:
        check_related(base, tuned)
    base = at_precision(base, _plan_precision(base, asked.backbone_precision, recipe))
    tokens = None
    if recipe.calibrated:
        tokens = _read_tokens(base, tuned, asked.calibration, recipe, device)
    with stages.measure("scan"):
        scanned = scan_checkpoint(base), scan_checkpoint(tuned)
    if asked.budget is not None:
        recipe = fit_recipe(describe_subject(*scanned), recipe, asked.budget)
    return Work(
        base=scanned[0],
        tuned=scanned[1],
        recipe=recipe,
        device=device,
        fingerprint=_fingerprint(*scanned, recipe=recipe, tokens=tokens, device=device),
        stages=stages,
        tokens=tokens,
    )


def _write(
    work: Work,
    out_dir: Path,
    devices: Sequence[torch.device],
    told: _Told,
    asked: _Asked,
) -> tuple[int, DistilReport | None]:
    """Write the parts that are missing, train if asked to, and join all.

    Returns:
        How many parts were there already, and what training gave.
    """
    folder, tuned = parts_folder(out_dir), work.tuned.checkpoint
    units = plan_units(tuned, _open_parts(folder, work.fingerprint))
    makers = Makers(compress=compress_unit, code=code_unit)
    resumed = write_parts(work, units, devices=devices, makers=makers, on_layer=told.on_layer)
    parts, report = [unit.path for unit in units], None
    head = _head(work, sum(read_part(path).with_feedback for path in parts))
    if work.recipe.distilled:
        with work.stages.measure("distil"):
            own = _find_own(tuned, asked.calibration)
            parts, report = distil_parts(work, units, head=head, own=own, on_step=told.on_step)
    with work.stages.measure("join"):
        write_delta(out_dir, parts, head=head, sidecars=tuned.sidecars)
        shutil.rmtree(folder)
    return resumed, report


def _plan_precision(base: Checkpoint, name: str, recipe: Recipe) -> Precision | None:
    if name != NATIVE and recipe.method == "lossless":
        raise UserError("precision_unusable", reason="a lossless delta restores every bit anyway")
    return plan_precision(name, base.layout)


def _read_tokens(
    base: Checkpoint,
    tuned: Checkpoint,
    calibration: Path | None,
    recipe: Recipe,
    device: torch.device,
) -> CalibrationTokens:
    own = _find_own(tuned, calibration)
    return read_calibration(
        own or DEFAULT_CALIBRATION,
        load_tokenizer(tuned.path, base.path),
        max_positions=find_max_positions(tuned.config, default=SEQUENCE_TOKENS),
        max_sequences=CPU_SEQUENCES if device.type == "cpu" else MAX_SEQUENCES,
        general=DEFAULT_CALIBRATION if own is not None and recipe.general_text else None,
    )


def _find_own(tuned: Checkpoint, calibration: Path | None) -> Path | None:
    """Return the text that is not the built-in one, if there is any."""
    chosen = calibration or find_calibration(tuned.path)
    return None if chosen.resolve() == DEFAULT_CALIBRATION.resolve() else chosen


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


def _head(work: Work, with_feedback: int) -> DeltaManifest:
    tuned, tokens = work.tuned.checkpoint, work.tokens
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
