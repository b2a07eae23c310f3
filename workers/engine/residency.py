"""Which models are in memory: the least recently used ones leave when a new one needs room."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deltacome_core.checkpoint import open_checkpoint
from workers.engine.errors import broken, too_busy
from workers.engine.model import LoadedModel, load_backbone, load_delta, measure_delta
from workers.engine.snapshots import Snapshot, SnapshotCache, Target

Key = tuple[str, str | None]


@dataclass(slots=True)
class _Resident:
    model: LoadedModel
    folder: Path
    users: int = 0


class Residency:
    """Loads on demand, one at a time; a model in use is never evicted, nor is its backbone."""

    def __init__(self, snapshots: SnapshotCache, *, memory_bytes: int, device: str) -> None:
        self._snapshots = snapshots
        self._memory_bytes = memory_bytes
        self._device = device
        self._residents: OrderedDict[Key, _Resident] = OrderedDict()
        self._table = threading.Lock()
        self._loading = threading.Lock()

    @contextlib.contextmanager
    def hold(self, target: Target) -> Iterator[LoadedModel]:
        """Keep the model in memory while it answers. Blocks while it is loaded."""
        resident = self.acquire(target)
        try:
            yield resident
        finally:
            self.release(target)

    def acquire(self, target: Target) -> LoadedModel:
        resident = self._take(_key(target))
        if resident is None:
            with self._loading:
                resident = self._take(_key(target)) or self._load(target)
        return resident.model

    def release(self, target: Target) -> None:
        with self._table:
            self._residents[_key(target)].users -= 1

    @property
    def resident_bytes(self) -> int:
        with self._table:
            return sum(item.model.size_bytes for item in self._residents.values())

    def resident_keys(self) -> list[Key]:
        with self._table:
            return list(self._residents)

    def _take(self, key: Key) -> _Resident | None:
        with self._table:
            resident = self._residents.get(key)
            if resident is not None:
                resident.users += 1
                self._residents.move_to_end(key)
            return resident

    def _load(self, target: Target) -> _Resident:
        if target.delta is None:
            return self._load_backbone(target.backbone)
        backbone_target = Target(backbone=target.backbone, delta=None)
        backbone = self._take(_key(backbone_target)) or self._load_backbone(target.backbone)
        try:
            folder = self._snapshots.materialise(target.delta)
            needed_bytes = measure_delta(folder, backbone.model)
            self._make_room(needed_bytes)
            model = load_delta(
                backbone.model,
                backbone.folder,
                folder,
                factor_bytes=self._factor_bytes(needed_bytes),
            )
        except BaseException:
            self.release(backbone_target)
            raise
        # The delta keeps its claim on the backbone until it is evicted itself.
        return self._insert(_key(target), _Resident(model, folder, users=1))

    def _load_backbone(self, snapshot: Snapshot) -> _Resident:
        folder = self._snapshots.materialise(snapshot)
        checkpoint = open_checkpoint(folder)
        cpu = self._device == "cpu"
        self._make_room(checkpoint.n_params * 4 if cpu else checkpoint.size_bytes)
        model = load_backbone(folder, device=self._device)
        return self._insert((snapshot.key, None), _Resident(model, folder, users=1))

    def _insert(self, key: Key, resident: _Resident) -> _Resident:
        with self._table:
            self._residents[key] = resident
        return resident

    def _factor_bytes(self, needed_bytes: int) -> int:
        """On a CPU half of the free room may hold dequantised factors; a GPU reads codes faster."""
        if self._device != "cpu":
            return 0
        return max(0, self._memory_bytes - self.resident_bytes - needed_bytes) // 2

    def _make_room(self, needed_bytes: int) -> None:
        if needed_bytes > self._memory_bytes:
            raise broken("This model is larger than the engine's memory.", code="model_too_large")
        with self._table:
            used = sum(item.model.size_bytes for item in self._residents.values())
            while used + needed_bytes > self._memory_bytes:
                idle = next((key for key, item in self._residents.items() if not item.users), None)
                if idle is None:
                    raise too_busy(
                        "There is no room in memory for this model while others answer.",
                        code="engine_full",
                        retry_after_s=5,
                    )
                used -= self._residents.pop(idle).model.size_bytes
                if idle[1] is not None:
                    self._residents[(idle[0], None)].users -= 1


def _key(target: Target) -> Key:
    return (target.backbone.key, target.delta.key if target.delta else None)
