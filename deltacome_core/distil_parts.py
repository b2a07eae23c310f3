"""The last step of a recipe that trains: finished parts in, trained parts out."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from deltacome_core.container import Delta, open_delta
from deltacome_core.distil import DistilReport, OnStep, distil_delta
from deltacome_core.distil_schedule import choose_schedule
from deltacome_core.distil_texts import Row, read_rows
from deltacome_core.entries import UnchangedEntry
from deltacome_core.errors import InternalError
from deltacome_core.manifest import DeltaManifest
from deltacome_core.models import find_max_positions, load_tokenizer
from deltacome_core.packed import PackedTensor
from deltacome_core.parts import read_part, write_delta, write_part
from deltacome_core.texts import DEFAULT_CALIBRATION
from deltacome_core.units import Unit, Work


def read_distil_rows(work: Work, own: Path | None) -> list[Row]:
    """Read the user's text and general text, or general text alone.

    Args:
        work: gives tokenizer, longest sequence and device.
        own: .txt or .jsonl file of the user's.

    Returns:
        Rows, the user's first.

    Raises:
        UserError: texts_invalid, tokenizer_missing.
    """
    tuned = work.tuned.checkpoint
    tokenizer = load_tokenizer(tuned.path, work.base.checkpoint.path)
    schedule = choose_schedule(tuned.n_params, work.device)
    longest = find_max_positions(tuned.config, default=schedule.own_tokens)
    rows: list[Row] = []
    if own is not None:
        rows = read_rows(own, tokenizer, max_tokens=schedule.own_tokens, longest=longest)
    return rows + read_rows(
        DEFAULT_CALIBRATION,
        tokenizer,
        max_tokens=schedule.general_tokens,
        longest=longest,
        is_general=True,
    )


def distil_parts(
    work: Work,
    units: Sequence[Unit],
    *,
    head: DeltaManifest,
    own: Path | None,
    on_step: OnStep,
) -> tuple[list[Path], DistilReport]:
    """Train finished parts; a run that is killed here trains again.

    Args:
        work: what the parts were made from, and the device.
        units: all parts, on disk.
        head: as for write_delta.
        own: the user's text, if there is any.
        on_step: told about each step of the training.

    Returns:
        The parts to join, and what training gave.

    Raises:
        UserError: texts_invalid, tokenizer_missing.
    """
    parts = [unit.path for unit in units]
    folder = parts[0].parent / "distil"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_delta(folder / "delta", parts, head=head)
    delta = open_delta(folder / "delta", verify_digests=False)
    found = distil_delta(
        work.base.checkpoint,
        work.tuned.checkpoint,
        delta,
        read_distil_rows(work, own),
        device=work.device,
        on_step=on_step,
    )
    if not found.tensors:
        return parts, found.report
    for unit in units:
        write_part(
            folder / unit.path.name,
            [found.tensors.get(name) or _stored(delta, name) for name in unit.names],
            layout=work.tuned.checkpoint.layout,
            fingerprint=work.fingerprint,
            with_feedback=read_part(unit.path).with_feedback,
        )
    return [folder / path.name for path in parts], found.report


def _stored(delta: Delta, name: str) -> PackedTensor | UnchangedEntry:
    packed = delta.load(name)
    if packed is not None:
        return packed
    entry = delta.entry(name)
    if not isinstance(entry, UnchangedEntry):
        raise InternalError(f"{name} has no delta, but is no unchanged tensor")
    return entry
