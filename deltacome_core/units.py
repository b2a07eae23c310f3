"""The parts a delta is made of, one decoder layer each, and the loop that makes them."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from deltacome_core.calibrate import CalibrationTokens, LayerCalibrator
from deltacome_core.checkpoint import Checkpoint, find_heads
from deltacome_core.costs import Stages
from deltacome_core.delta import ScannedCheckpoint
from deltacome_core.entries import REST_GROUP, UnchangedEntry, group_of, layer_order
from deltacome_core.lossless_spool import CodedSpool, open_spool
from deltacome_core.moments import SharedHessian
from deltacome_core.packed import PackedTensor
from deltacome_core.parts import read_part, write_part
from deltacome_core.pipeline import run_jobs
from deltacome_core.recipe import Recipe
from deltacome_core.rows import choose_rank
from deltacome_core.walk import Walks

_MATRIX_DIMENSIONS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDone:
    """Progress: one layer is on disk; relative_error is the mean over its low-rank matrices.

    On several devices layers end in any order. seconds counts from the first read of the layer
    until it is on disk, calibration apart; what overlaps with other layers is counted in both.
    """

    group: str
    index: int
    n_layers: int
    n_matrices: int
    relative_error: float
    seconds: float
    resumed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """The tensors of one part: a decoder layer, or everything outside the layers."""

    group: str
    names: tuple[str, ...]
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every unit is made from, and the device that makes it."""

    base: ScannedCheckpoint
    tuned: ScannedCheckpoint
    recipe: Recipe
    device: torch.device
    fingerprint: str
    stages: Stages
    tokens: CalibrationTokens | None
    walks: Walks = field(default_factory=Walks)

    def is_unchanged(self, name: str) -> bool:
        if self.base.checkpoint.is_rounded(name):
            # What the fine-tune left alone was moved by rounding: the delta moves it back.
            return False
        same_type = self.base.checkpoint.layout.get(name) == self.tuned.checkpoint.layout[name]
        return same_type and self.base.hashes[name] == self.tuned.hashes[name]

    def is_changed_matrix(self, name: str) -> bool:
        _, shape = self.tuned.checkpoint.layout[name]
        return len(shape) >= _MATRIX_DIMENSIONS and not self.is_unchanged(name)

    def needs_basis(self, name: str) -> bool:
        """Whether a vocabulary is too large for the budget, should all of its rows have changed."""
        _, shape = self.base.checkpoint.layout.get(name, ("", ()))
        if len(shape) != _MATRIX_DIMENSIONS or self.is_unchanged(name):
            return False
        rows, cols = shape
        return choose_rank(rows, cols, rows, self.recipe) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed:
    """The packed tensors of a unit, on the host."""

    tensors: list[PackedTensor | UnchangedEntry]
    errors: list[float]
    with_feedback: int

    def join(self, more: "Compressed") -> "Compressed":
        """Put two halves of a unit together."""
        return Compressed(
            tensors=self.tensors + more.tensors,
            errors=self.errors + more.errors,
            with_feedback=self.with_feedback + more.with_feedback,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Makers:
    """How a unit is made: by the device, or, bit for bit, while it is written."""

    compress: Callable[[Work, Unit, list[SharedHessian]], Compressed]
    code: Callable[[Work, Unit, CodedSpool], Compressed]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A unit, and the Hessians of its inputs: the maker takes them off the list once used."""

    unit: Unit
    hessians: list[SharedHessian]


def plan_units(tuned: Checkpoint, folder: Path) -> list[Unit]:
    """Cut a checkpoint into units.

    Args:
        tuned: the fine-tune.
        folder: where their parts go.

    Returns:
        What lies outside the layers first, then the layers in order.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(tuned.tensors):
        groups.setdefault(group_of(name), []).append(name)

    return [
        Unit(group=group, names=tuple(groups[group]), path=folder / f"{index:05d}.safetensors")
        for index, group in enumerate(sorted(groups, key=layer_order))
    ]


def read_order(names: Sequence[str], hessians: Sequence[SharedHessian]) -> list[list[str]]:
    """Decide which tensors of a unit are read and packed together.

    Args:
        names: changed tensors.
        hessians: of the unit.

    Returns:
        Tensors that share an input in one row, each other tensor in a row of its own.
    """
    row_of = {name: [name] for name in names}
    for shared in hessians:
        merged = dict.fromkeys(
            member for name in shared.tensors if name in row_of for member in row_of[name]
        )
        for name in merged:
            row_of[name] = list(merged)
    return [row for name, row in row_of.items() if row[0] == name]


class _Progress:
    """Tells somebody about each part that is on disk."""

    def __init__(self, units: Sequence[Unit], on_layer: Callable[[LayerDone], None]) -> None:
        self._place = {unit.group: index for index, unit in enumerate(units)}
        self._on_layer = on_layer

    def __call__(
        self, unit: Unit, errors: Sequence[float], seconds: float, *, resumed: bool
    ) -> None:
        self._on_layer(
            LayerDone(
                group=unit.group,
                index=self._place[unit.group],
                n_layers=len(self._place),
                n_matrices=len(errors),
                relative_error=sum(errors) / len(errors) if errors else 0.0,
                seconds=seconds,
                resumed=resumed,
            )
        )


def write_parts(
    work: Work,
    units: Sequence[Unit],
    *,
    devices: Sequence[torch.device],
    makers: Makers,
    on_layer: Callable[[LayerDone], None],
) -> int:
    """Write the parts that are missing, calibrated layers first.

    Args:
        work: what they are made from; its device is not used.
        units: all parts.
        devices: where units are made; the first also runs the model.
        makers: how.
        on_layer: called by one thread at a time, not always by the caller's.

    Returns:
        How many parts were there already.
    """
    pending = {unit.group: unit for unit in units if not unit.path.is_file()}
    announce = _Progress(units, on_layer)

    def store(unit: Unit, made: Compressed, started: float) -> None:
        with work.stages.measure("write"):
            write_part(
                unit.path,
                made.tensors,
                layout=work.tuned.checkpoint.layout,
                fingerprint=work.fingerprint,
                with_feedback=made.with_feedback,
            )
        announce(unit, made.errors, time.monotonic() - started, resumed=False)

    def code_and_store(unit: Unit, started: float) -> None:
        with open_spool(unit.path.parent) as spool:
            store(unit, makers.code(work, unit, spool), started)

    def prepare(job: _Job, device: torch.device) -> Callable[[], None]:
        started = time.monotonic()
        if work.recipe.method == "lossless":
            return partial(code_and_store, job.unit, started)
        with work.stages.measure("matrices"):
            made = makers.compress(replace(work, device=device), job.unit, job.hessians)
        # The job, and the Hessians with it, must not wait for the writer.
        return partial(store, job.unit, made, started)

    resumed = [unit for unit in units if unit.group not in pending]
    for unit in resumed:
        read_part(unit.path)
        announce(unit, (), 0.0, resumed=True)
    jobs = _list_jobs(work, pending, devices[0])
    run_jobs(jobs, prepare, devices=devices, made_on_first=work.tokens is not None)
    return len(resumed)


def _list_jobs(work: Work, pending: dict[str, Unit], device: torch.device) -> Iterator[_Job]:
    left = dict(pending)
    for group, hessians in _walk_layers(work, pending, device):
        yield _Job(unit=left.pop(group), hessians=hessians)
        del hessians
    for unit in left.values():
        yield _Job(unit=unit, hessians=[])


def _walk_layers(
    work: Work, pending: dict[str, Unit], device: torch.device
) -> Iterator[tuple[str, list[SharedHessian]]]:
    """Yield the Hessians of each layer that is pending and changed, then that of the head.

    The model stops early where nothing more is wanted of it.
    """
    matrices = {
        group
        for group, unit in pending.items()
        if group != REST_GROUP and any(work.is_changed_matrix(name) for name in unit.names)
    }
    heads = [name for name in find_heads(work.tuned.checkpoint.layout) if work.needs_basis(name)]
    head_groups = {group_of(name) for name in heads} & pending.keys()
    if work.tokens is None or not (matrices or head_groups):
        return

    def is_wanted(names: set[str]) -> bool:
        return any(group_of(name) in matrices for name in names)

    with work.stages.measure("calibrate"):
        calibrator = LayerCalibrator(work.tuned.checkpoint.path, work.tokens, device)
    layers = calibrator.layers(is_wanted)
    while matrices:
        with work.stages.measure("calibrate"):
            hessians = next(layers, None)
        if hessians is None:
            return
        groups = {group_of(name) for shared in hessians for name in shared.weights}
        found = [(group, _of_group(hessians, group)) for group in sorted(groups & matrices)]
        # From here on only whoever is given a list holds its Hessians.
        hessians.clear()
        while found:
            yield found.pop(0)
        matrices -= groups
    if not head_groups:
        return
    with work.stages.measure("calibrate"):
        for _ in layers:
            continue
        head = SharedHessian(weights=tuple(heads), hessian=calibrator.head_hessian())
    # The states of all sequences, which the vocabulary does not need.
    del layers, calibrator
    for group in head_groups:
        yield group, [head]


def _of_group(hessians: Sequence[SharedHessian], group: str) -> list[SharedHessian]:
    return [shared for shared in hessians if group in map(group_of, shared.tensors)]
