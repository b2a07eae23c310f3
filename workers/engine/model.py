"""Backbones and deltas made ready to answer: in the shared model where possible, else alone."""

import gc
import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from deltacome_core.checkpoint import checkpoint_digest, open_checkpoint
from deltacome_core.container import Delta, open_delta
from deltacome_core.entries import (
    DeltaEntry,
    RowsEntry,
    UnchangedEntry,
)
from deltacome_core.errors import UserError
from deltacome_core.held_files import HeldFiles
from deltacome_core.manifest import read_manifest
from deltacome_core.models import build_skeleton, load_config, load_model, load_tokenizer
from deltacome_core.parameters import locate_parameters
from deltacome_core.precision import NATIVE
from workers.engine.arena_slots import EXACT, KernelOptions
from workers.engine.canary import UNTESTED, CanaryResult
from workers.engine.executor import Executor, PlainExecutor
from workers.engine.own_module import (
    DeltaLinear,
    fill_module,
    locate_tensors,
    own_bytes,
    runs_packed,
)
from workers.engine.parts import is_shareable, list_others, read_parts, same_decoder
from workers.engine.shared import SharedExecutor

log = logging.getLogger(__name__)

# Files are read by the kernel, which one thread alone cannot keep busy.
READERS = 8
# The tokenizer, and hashing, which follows the readers and must not wait behind them.
_BESIDE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """Ready to answer; `size_bytes` counts what this model alone keeps in memory.

    `canary` says what was proven about the delta when it was loaded; `canary.header` is the value
    of the response header `x-deltacome-canary`. `executor` runs its tokens, in its `slot` where it
    is one of many deltas on one backbone; `key` names it to the scheduler.
    """

    module: Any
    tokenizer: Any
    eos_ids: frozenset[int]
    device: str
    context_tokens: int
    vocabulary: int
    size_bytes: int
    executor: Executor
    slot: int = -1
    key: str = ""
    canary: CanaryResult = UNTESTED


def load_backbone(folder: Path, *, device: str, kv_bytes: int = 1 << 28) -> LoadedModel:
    """Load a backbone to be run by its own code; `share_backbone` makes room for deltas on it."""
    module = load_model(folder, device=device)
    parameters = {id(tensor): tensor for tensor in module.parameters()}
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in parameters.values())
    executor = PlainExecutor(module, device=device, kv_bytes=kv_bytes)
    return _loaded(
        module,
        module.config,
        folder,
        load_tokenizer(folder),
        executor=executor,
        device=device,
        size_bytes=size_bytes,
    )


def share_backbone(
    backbone: LoadedModel,
    folder: Path,
    *,
    kv_bytes: int,
    n_slots: int,
    delta_bytes: int = 1 << 30,
    kernels: KernelOptions = EXACT,
) -> LoadedModel:
    """Let one model serve the backbone and its deltas in common steps.

    On a GPU the slots of deltas take up to `delta_bytes`.

    An architecture that the shared model cannot run stays with its own code, one answer at a time.
    """
    try:
        executor = SharedExecutor(
            backbone.module,
            folder,
            device=backbone.device,
            kv_bytes=kv_bytes,
            n_slots=n_slots,
            delta_bytes=delta_bytes,
            kernels=kernels,
        )
    except UserError as error:
        if error.code != "architecture_unknown":
            raise
        log.warning("backbone_not_shared: %s", error)
        return backbone
    return replace(backbone, executor=executor)


def settle_memory() -> None:
    """Leave all objects that there are now out of later collections of garbage.

    A library and a backbone are a million of them: walking those stops every thread for up to half
    a second, in the middle of answers and of loading a delta.
    """
    # Of what was left out before, some may be garbage by now.
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def load_shared(
    backbone: LoadedModel, backbone_folder: Path, folder: Path, *, factor_bytes: int
) -> LoadedModel | None:
    """Put a delta into a slot of the shared model; None when it changes more than slots hold.

    Raises:
        UserError: the delta is for another backbone or is damaged, or no slot is free.
    """
    executor = backbone.executor
    if not isinstance(executor, SharedExecutor):
        return None
    delta = open_delta(folder, verify_digests=False)
    _check_backbone(delta, backbone_folder)
    entries = delta.entries.values()
    names = _name_parameters(backbone.module, entries)
    if not same_decoder(backbone_folder, folder) or not is_shareable(
        entries, names, executor.places
    ):
        return None
    packed = executor.vocabulary.keeps_packed
    with (
        ThreadPoolExecutor(READERS, thread_name_prefix="engine-read") as readers,
        ThreadPoolExecutor(_BESIDE, thread_name_prefix="engine-beside") as beside,
    ):
        # Loads come one at a time, and each has its own page-locked memory.
        held = HeldFiles(delta.folder, readers, pin=executor.is_async, first=list_others(delta))
        # Hashing takes as long as everything else; the slot is nobody's until both are done.
        checked = beside.submit(held.check)
        tokenizer = beside.submit(load_tokenizer, folder, backbone_folder)
        # What stays packed is copied to a slot; on a CPU it stays itself, and the rest shall go.
        read = held.read if packed else lambda *place: held.read(*place).clone()
        try:
            parts = read_parts(
                replace(delta, read=read),
                names,
                executor.places,
                open_checkpoint(backbone_folder),
                keep_packed=packed,
            )
            parts.memory = held.memory if packed else None
            slot = executor.load(parts, factor_bytes=factor_bytes)
        except UserError:
            # Where a file is damaged, that is the reason to give.
            checked.result()
            raise
        try:
            checked.result()
            loaded = _loaded(
                executor.module,
                load_config(folder),
                folder,
                tokenizer.result(),
                executor=executor,
                device=backbone.device,
                size_bytes=executor.size_bytes(slot),
            )
        except BaseException:
            executor.evict(slot)
            raise
    return replace(loaded, slot=slot)


def load_delta(
    backbone: LoadedModel,
    backbone_folder: Path,
    folder: Path,
    *,
    factor_bytes: int,
    kv_bytes: int = 1 << 28,
) -> LoadedModel:
    """Put a delta on the backbone as a model of its own; up to `factor_bytes` is kept dequantised.

    Raises:
        UserError: the delta is for another backbone, is damaged, or names a tensor that this
            architecture does not have. Nothing is served in its place.
    """
    delta = open_delta(folder)
    _check_backbone(delta, backbone_folder)
    module = build_skeleton(folder, backbone.module.dtype)
    files = open_checkpoint(backbone_folder)
    matrices = fill_module(module, backbone.module, delta, files, device=backbone.device)
    size_bytes = own_bytes(module, backbone.module)
    for name, matrix in matrices.items():
        fits = matrix.factors_size_bytes <= factor_bytes
        factors = matrix.factors() if fits else None
        if fits:
            factor_bytes -= matrix.factors_size_bytes
            size_bytes += matrix.factors_size_bytes
        size_bytes += matrix.size_bytes
        layer = name.removesuffix(".weight")
        module.set_submodule(layer, DeltaLinear(module.get_submodule(layer), matrix, factors))
    executor = PlainExecutor(module, device=backbone.device, kv_bytes=kv_bytes)
    return _loaded(
        module,
        module.config,
        folder,
        load_tokenizer(folder, backbone_folder),
        executor=executor,
        device=backbone.device,
        size_bytes=size_bytes,
    )


def measure_delta(folder: Path, backbone: LoadedModel) -> int:
    """Say how much memory a delta takes at most, before any of it is loaded.

    Matrices of linear layers stay as they are on disk; everything else becomes dense.
    """
    manifest = read_manifest(folder)
    stored_bytes = sum(manifest.files[name].size_bytes for name in manifest.data_files)
    executor = backbone.executor
    if isinstance(executor, SharedExecutor) and executor.vocabulary.keeps_packed:
        return max(stored_bytes, executor.slots.size_bytes(-1))
    item_bytes = int(backbone.module.dtype.itemsize)
    places = locate_tensors(backbone.module, manifest.entries)
    dense = sum(
        prod(entry.shape) * item_bytes
        for entry in manifest.entries
        if not isinstance(entry, UnchangedEntry)
        and not runs_packed(backbone.module, entry, places.get(entry.name))
    )
    return dense + stored_bytes


def _check_backbone(delta: Delta, backbone_folder: Path) -> None:
    """Compare what the delta was made from with what the hub says this backbone is."""
    served_as = delta.manifest.backbone.served_as
    if served_as != NATIVE:
        raise UserError("backbone_precision_mismatch", expected=served_as, found=NATIVE)
    listing = backbone_folder / "tensors.json"
    if not listing.exists():
        return
    table = json.loads(listing.read_text())
    layout = {name: (row["dtype"], tuple(row["shape"])) for name, row in table.items()}
    found = checkpoint_digest(layout, {name: row["sha256"] for name, row in table.items()})
    expected = delta.manifest.backbone.digest
    if found != expected:
        raise UserError(
            "backbone_digest_mismatch", tensors=[f"the set {found[:12]}"], expected=expected[:12]
        )


def _name_parameters(module: Any, entries: Iterable[DeltaEntry]) -> dict[str, str]:
    """The parameter of the backbone that each tensor fills wholly, or outgrows by new rows."""
    layout = {
        entry.name: (
            entry.dtype,
            (entry.shape[0] - entry.n_new, *entry.shape[1:])
            if isinstance(entry, RowsEntry)
            else entry.shape,
        )
        for entry in entries
    }
    return {
        pieces[0].tensor: name
        for name, pieces in locate_parameters(module, layout).items()
        if pieces[0].block == ()
    }


def _loaded(
    module: Any,
    config: Any,
    folder: Path,
    tokenizer: Any,
    *,
    executor: Executor,
    device: str,
    size_bytes: int,
) -> LoadedModel:
    text_config = config.get_text_config()
    return LoadedModel(
        module=module,
        tokenizer=tokenizer,
        eos_ids=frozenset(_eos_ids(folder, text_config, tokenizer)),
        device=device,
        context_tokens=int(text_config.max_position_embeddings),
        vocabulary=int(text_config.vocab_size),
        size_bytes=size_bytes,
        executor=executor,
    )


def _eos_ids(folder: Path, config: Any, tokenizer: Any) -> Iterator[int]:
    generation = folder / "generation_config.json"
    named = json.loads(generation.read_text()).get("eos_token_id") if generation.exists() else None
    for value in (named, config.eos_token_id, tokenizer.eos_token_id):
        if isinstance(value, int):
            yield value
        elif isinstance(value, list):
            yield from value
