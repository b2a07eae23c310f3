"""Which models are in memory: the least recently used ones leave when a new one needs room."""

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deltacome_core.checkpoint import open_checkpoint
from deltacome_core.errors import UserError
from kernels.fragments import PRECISIONS
from workers.engine.arena_slots import KernelOptions
from workers.engine.canary import prove
from workers.engine.config import EngineConfig
from workers.engine.errors import ApiError, broken, too_busy
from workers.engine.metrics import EngineMetrics
from workers.engine.model import (
    LoadedModel,
    load_backbone,
    load_delta,
    load_shared,
    measure_delta,
    settle_memory,
    share_backbone,
)
from workers.engine.preparation import KernelPreparation
from workers.engine.snapshots import Snapshot, SnapshotCache, Target

log = logging.getLogger(__name__)

Key = tuple[str, str | None]
# Blobs are fetched side by side; into memory they go one after the other.
_LOADERS = 4
# A model that cannot be served is not tried again for every request of an impatient client.
_FAILURE_KEPT_S = 5.0
_SETTLE_S = 5


@dataclass(slots=True)
class _Resident:
    model: LoadedModel
    folder: Path
    digest: str
    load_s: float
    users: int = 0
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class _Failure:
    error: Exception
    at_s: float


class Residency:
    """Loads on demand; a model in use is never evicted, nor is its backbone.

    A delta that cannot be loaded is an error to whoever asks for it: nothing stands in its place.
    """

    def __init__(
        self, snapshots: SnapshotCache, config: EngineConfig, metrics: EngineMetrics | None = None
    ) -> None:
        self._snapshots = snapshots
        self._config = config
        self._metrics = metrics or EngineMetrics()
        self._residents: OrderedDict[Key, _Resident] = OrderedDict()
        self._pending: dict[Key, Future[None]] = {}
        self._failures: dict[Key, _Failure] = {}
        self._table = threading.Lock()
        self._loading = threading.Lock()
        self._preparation = KernelPreparation(self._metrics)
        self._loaders = ThreadPoolExecutor(_LOADERS, thread_name_prefix="engine-load")

    @contextlib.contextmanager
    def hold(self, target: Target) -> Iterator[LoadedModel]:
        """Keep the model in memory while it answers. Blocks while it is loaded."""
        model = self.acquire(target)
        try:
            yield model
        finally:
            self.release(target)

    def acquire(self, target: Target) -> LoadedModel:
        """Bring a model into memory and keep it there until `release`.

        Raises:
            ApiError: 503 while it is still being loaded after `load_timeout_s`, or when there is
                no room; 500 when it cannot be served.
            UserError: its files are not what they should be.
        """
        key = _key(target)
        deadline = time.monotonic() + self._config.load_timeout_s
        while (resident := self._take(key)) is None:
            waiting = self._start_loading(key, target)
            try:
                waiting.result(timeout=max(0.0, deadline - time.monotonic()))
            except TimeoutError as error:
                raise too_busy(
                    "This model is still being loaded; try again in a moment.",
                    code="model_loading",
                    retry_after_s=_SETTLE_S,
                ) from error
        return resident.model

    def release(self, target: Target) -> None:
        with self._table:
            self._residents[_key(target)].users -= 1

    def close(self) -> None:
        self._loaders.shutdown(wait=False, cancel_futures=True)
        self._preparation.close()

    @property
    def is_preparing(self) -> bool:
        """Whether kernels are being compiled for a delta that is on its way."""
        return self._preparation.is_running

    @property
    def resident_bytes(self) -> int:
        with self._table:
            return sum(item.model.size_bytes for item in self._residents.values())

    def resident_keys(self) -> list[Key]:
        with self._table:
            return list(self._residents)

    def describe(self) -> list[dict[str, Any]]:
        """Every model in memory, the least recently used first."""
        with self._table:
            residents = list(self._residents.items())
        return [
            {
                "backbone": backbone,
                "delta": delta,
                "digest": item.digest,
                "size_bytes": item.model.size_bytes,
                "slot": item.model.slot,
                "users": item.users,
                "pinned": item.pinned,
                "canary": item.model.canary.header,
                "load_seconds": item.load_s,
            }
            for (backbone, delta), item in residents
        ]

    def _take(self, key: Key) -> _Resident | None:
        with self._table:
            resident = self._residents.get(key)
            if resident is not None:
                resident.users += 1
                self._residents.move_to_end(key)
            return resident

    def _start_loading(self, key: Key, target: Target) -> "Future[None]":
        with self._table:
            failure = self._failures.get(key)
            if failure and time.monotonic() - failure.at_s < _FAILURE_KEPT_S:
                raise failure.error
            if key not in self._pending:
                self._pending[key] = self._loaders.submit(self._load_and_note, key, target)
            return self._pending[key]

    def _load_and_note(self, key: Key, target: Target) -> None:
        try:
            self._load(target)
        except Exception as error:
            code = getattr(error, "code", "internal")
            self._metrics.load_failures.add(1, code=str(code))
            log.warning("model_not_loaded: %s", error)
            if isinstance(error, UserError) and code == "file_digest_mismatch":
                self._snapshots.forget(target)
            may_change = isinstance(error, ApiError) and error.retry_after_s is not None
            if not may_change:
                with self._table:
                    self._failures[key] = _Failure(error, time.monotonic())
            raise
        finally:
            with self._table:
                del self._pending[key]

    def _load(self, target: Target) -> None:
        for snapshot in (target.backbone, target.delta):
            if snapshot is not None:
                self._snapshots.materialise(snapshot)
        with self._loading:
            if _key(target) in self.resident_keys():
                return
            started_s = time.monotonic()
            try:
                self._load_files(target, started_s)
            except torch.OutOfMemoryError as error:
                raise too_busy(
                    "The device has no memory for this model while others answer.",
                    code="engine_full",
                    retry_after_s=_SETTLE_S,
                ) from error
            self._metrics.cold_loads.add(1)
            self._metrics.load_seconds.observe(time.monotonic() - started_s)
        self._metrics.resident.set(len(self.resident_keys()))
        self._metrics.resident_bytes.set(self.resident_bytes)

    def _load_files(self, target: Target, started_s: float) -> None:
        backbone_target = Target(backbone=target.backbone, delta=None)
        backbone = self._take(_key(backbone_target))
        if backbone is None:
            backbone = self._load_backbone(target.backbone, started_s)
        try:
            if target.delta is None:
                self.release(backbone_target)
            else:
                # The delta keeps its claim on the backbone until it is evicted itself.
                self._load_delta(backbone, target, target.delta, started_s)
        except BaseException:
            self.release(backbone_target)
            raise

    def _load_delta(
        self, backbone: _Resident, target: Target, snapshot: Snapshot, started_s: float
    ) -> None:
        folder = self._snapshots.materialise(snapshot)
        needed_bytes = measure_delta(folder, backbone.model)
        self._make_room(needed_bytes)
        factor_bytes = self._factor_bytes(needed_bytes)
        model = self._load_shared(backbone, folder, factor_bytes=factor_bytes)
        if model is None:
            model = load_delta(
                backbone.model,
                backbone.folder,
                folder,
                factor_bytes=factor_bytes,
                kv_bytes=self._config.kv_bytes,
            )
        model = replace(model, key=snapshot.key)
        try:
            model = replace(model, canary=prove(model, folder))
        except BaseException:
            _leave(model)
            raise
        self._insert(_key(target), model, folder, digest=snapshot.digest, started_s=started_s)

    def _load_shared(
        self, backbone: _Resident, folder: Path, *, factor_bytes: int
    ) -> LoadedModel | None:
        """Put a delta into a slot, taking one from the least recently used delta if need be."""
        while True:
            try:
                return load_shared(
                    backbone.model, backbone.folder, folder, factor_bytes=factor_bytes
                )
            except UserError as error:
                if error.code == "arena_recipe_unknown":
                    # Kernels of a single delta read every recipe, only not in common steps.
                    log.warning("delta_not_shared: %s", error)
                    return None
                if error.code != "arena_full":
                    raise
                with self._table:
                    self._evict_one(slots_of=backbone.model)

    def _load_backbone(self, snapshot: Snapshot, started_s: float) -> _Resident:
        folder = self._snapshots.materialise(snapshot)
        checkpoint = open_checkpoint(folder)
        cpu = self._config.device == "cpu"
        self._make_room(checkpoint.n_params * 4 if cpu else checkpoint.size_bytes)
        model = load_backbone(folder, device=self._config.device, kv_bytes=self._config.kv_bytes)
        model = share_backbone(
            model,
            folder,
            kv_bytes=self._config.kv_bytes,
            n_slots=self._config.max_resident,
            delta_bytes=max(0, self._config.memory_bytes - model.size_bytes),
            kernels=KernelOptions(
                prepare=self._preparation.prepare,
                planes=PRECISIONS[self._config.precision],
            ),
        )
        settle_memory()
        model = replace(model, key=snapshot.key)
        return self._insert(
            (snapshot.key, None),
            model,
            folder,
            digest=snapshot.digest,
            started_s=started_s,
            users=1,
        )

    def _insert(
        self,
        key: Key,
        model: LoadedModel,
        folder: Path,
        *,
        digest: str,
        started_s: float,
        users: int = 0,
    ) -> _Resident:
        resident = _Resident(
            model,
            folder,
            digest,
            load_s=time.monotonic() - started_s,
            users=users,
            pinned=digest in self._config.pinned,
        )
        with self._table:
            self._residents[key] = resident
            self._failures.pop(key, None)
        return resident

    def _factor_bytes(self, needed_bytes: int) -> int:
        """On a CPU half of the free room may hold dequantised factors; a GPU reads codes faster."""
        if self._config.device != "cpu":
            return 0
        return max(0, self._config.memory_bytes - self.resident_bytes - needed_bytes) // 2

    def _make_room(self, needed_bytes: int) -> None:
        if needed_bytes > self._config.memory_bytes:
            raise broken("This model is larger than the engine's memory.", code="model_too_large")
        with self._table:
            while (
                sum(item.model.size_bytes for item in self._residents.values()) + needed_bytes
                > self._config.memory_bytes
            ):
                self._evict_one()

    def _evict_one(self, *, slots_of: LoadedModel | None = None) -> None:
        """Let the least recently used model go that nobody uses; of one executor if so asked.

        Raises:
            ApiError: 503, all are in use or pinned.
        """
        for key, item in self._residents.items():
            wanted = slots_of is None or (
                item.model.executor is slots_of.executor and item.model.slot >= 0
            )
            if wanted and not item.users and not item.pinned:
                del self._residents[key]
                _leave(item.model)
                if key[1] is not None:
                    self._residents[(key[0], None)].users -= 1
                self._metrics.evictions.add(1)
                return
        raise too_busy(
            "There is no room in memory for this model while others answer.",
            code="engine_full",
            retry_after_s=_SETTLE_S,
        )


def _key(target: Target) -> Key:
    return (target.backbone.key, target.delta.key if target.delta else None)


def _leave(model: LoadedModel) -> None:
    if model.slot >= 0:
        model.executor.evict(model.slot)
