"""Deltas come and go; one that cannot be served is an error, never the backbone."""

import json
import threading
import weakref

import pytest
import torch
from engines import make_config, no_claim
from serving import answer

from deltacome_core.errors import UserError
from deltacome_core.verify import save_report, verify_delta
from hub.storage import LocalStore
from workers.engine.canary import judge
from workers.engine.errors import ApiError
from workers.engine.metrics import EngineMetrics
from workers.engine.residency import Residency
from workers.engine.shared import SharedExecutor
from workers.engine.snapshots import SnapshotCache, parse_target


class Blobs:
    """The store of the models, whose reads a test may hold back or break."""

    def __init__(self, root):
        self._store = LocalStore(root / "blobs")
        self.gate = threading.Event()
        self.gate.set()
        self.error = None

    def read(self, sha256, *, start=0, end=None):
        self.gate.wait(60)
        if self.error is not None:
            raise self.error
        return self._store.read(sha256, start=start, end=end)


@pytest.fixture
def blobs(models):
    return Blobs(models.root)


@pytest.fixture
def residency(models, blobs, tmp_path):
    made = open_residency(models, blobs, tmp_path)
    yield made
    made._loaders.shutdown(wait=True)


def open_residency(models, blobs, tmp_path, **fields):
    config = make_config(models.root, cache_dir=tmp_path / "cache", **fields)
    return Residency(SnapshotCache(config.cache_dir, blobs), config, EngineMetrics())


def target_of(models, delta=None, **files):
    raw = models.target(delta)
    if delta is not None:
        raw["delta"]["files"] |= files
    return parse_target(json.dumps(raw))


def test_deltas_of_one_backbone_share_its_model(models, residency):
    held = [residency.acquire(target_of(models, name)) for name in (None, "one", "two")]
    assert isinstance(held[0].executor, SharedExecutor)
    assert len({id(model.executor) for model in held}) == 1
    assert [model.slot for model in held] == [-1, 0, 1]
    assert len({tuple(heard.ids) for heard in answer(held, max_tokens=24)}) == 3
    described = residency.describe()
    # The backbone is used by who asked for it and by both deltas.
    assert sorted(item["users"] for item in described) == [1, 1, 3]
    assert all(item["canary"] == "absent" for item in described)


def test_many_who_ask_for_a_cold_delta_load_it_once(models, residency, blobs):
    blobs.gate.clear()
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(residency.acquire(target_of(models, "one"))))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    blobs.gate.set()
    for thread in threads:
        thread.join(60)
    assert len({id(model) for model in found}) == 1
    assert residency._metrics.cold_loads.value() == 1
    assert residency.describe()[-1]["users"] == 5


@pytest.mark.parametrize("failure", ["lost", "away", "damaged"])
def test_files_that_cannot_be_had_are_a_named_error(models, residency, blobs, failure):
    target = target_of(models, "one", **{"delta.json": "0" * 64}) if failure == "lost" else None
    expected = {"lost": (500, "blob_missing"), "away": (503, "store_unreachable")}
    if failure == "away":
        blobs.error = ConnectionError("no route")
    if failure == "damaged":
        wrong = models.store.put([b"{}"], no_claim).sha256
        target = target_of(models, "one", **{"delta.json": wrong})
    with pytest.raises((ApiError, UserError)) as refusal:
        residency.acquire(target or target_of(models, "one"))
    if failure in expected:
        assert (refusal.value.status, refusal.value.code) == expected[failure]
    assert (target or target_of(models, "one")).delta.key not in {
        delta for _, delta in residency.resident_keys()
    }


def test_a_store_that_came_back_is_asked_again(models, residency, blobs):
    blobs.error = ConnectionError("no route")
    with pytest.raises(ApiError):
        residency.acquire(target_of(models, "one"))
    blobs.error = None
    assert residency.acquire(target_of(models, "one")).slot == 0


def test_a_fetch_that_takes_too_long_asks_to_come_back(models, blobs, tmp_path):
    residency = open_residency(models, blobs, tmp_path, load_timeout_s=0.1)
    blobs.gate.clear()
    with pytest.raises(ApiError) as refusal:
        residency.acquire(target_of(models, "one"))
    assert (refusal.value.status, refusal.value.code) == (503, "model_loading")
    assert refusal.value.retry_after_s
    blobs.gate.set()
    # It goes on without anyone waiting; the next test must not meet it.
    residency._loaders.shutdown(wait=True)


def test_a_file_that_rotted_in_the_cache_is_refused_and_fetched_again(models, residency, tmp_path):
    target = target_of(models, "one")
    residency._snapshots.materialise(target.delta)
    path = tmp_path / "cache" / "snapshots" / target.delta.key / "delta.safetensors"
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(UserError) as refusal:
        residency.acquire(target)
    assert refusal.value.code == "file_digest_mismatch"
    residency._failures.clear()
    assert residency.acquire(target).slot == 0


def test_slots_are_taken_from_the_least_recently_used(models, blobs, tmp_path):
    residency = open_residency(models, blobs, tmp_path, max_resident=1)
    one, two = target_of(models, "one"), target_of(models, "two")
    with residency.hold(one) as model:
        first = answer([model], max_tokens=8)[0].ids
        with pytest.raises(ApiError) as refusal:
            residency.acquire(two)
        assert (refusal.value.status, refusal.value.code) == (503, "engine_full")
    with residency.hold(two) as model:
        assert answer([model], max_tokens=8)[0].ids != first
    with residency.hold(one) as model:
        assert answer([model], max_tokens=8)[0].ids == first
    assert residency._metrics.evictions.value() == 2
    residency.close()


def test_a_backbone_that_left_takes_its_memory_along(models, residency):
    """What lives long is kept out of garbage collection; when it has left it is garbage."""
    module = weakref.ref(residency.acquire(target_of(models)).module)
    residency.release(target_of(models))
    assert module() is not None
    residency._make_room(residency._config.memory_bytes)
    assert module() is None


def test_a_pinned_delta_stays(models, blobs, tmp_path):
    target = target_of(models, "one")
    residency = open_residency(
        models, blobs, tmp_path, max_resident=1, pinned={target.delta.digest}
    )
    with residency.hold(target):
        pass
    with pytest.raises(ApiError):
        residency.acquire(target_of(models, "two"))
    assert residency.describe()[-1]["pinned"]
    residency.close()


@pytest.fixture(scope="module")
def verified(models):
    """The report of delta "one", as its verification wrote it."""
    folder = models.root / "one"
    report = verify_delta(models.root / "backbone", folder / "tuned", folder / "delta")
    place = models.root / "reports"
    place.mkdir(exist_ok=True)
    return save_report(report, place)


def with_report(models, path, name):
    return target_of(
        models, name, **{"verification.json": models.store.put_file(path, no_claim).sha256}
    )


def test_the_canary_proves_that_the_delta_is_applied(models, residency, verified):
    model = residency.acquire(with_report(models, verified, "one"))
    assert model.canary.state == "applied"
    assert model.canary.error < 1e-3 < model.canary.backbone_error
    assert model.canary.header.startswith("applied; error=")
    assert model.executor.pages.used == 0


def test_the_canary_catches_another_delta(models, residency, verified):
    with pytest.raises(ApiError) as refusal:
        residency.acquire(with_report(models, verified, "two"))
    assert (refusal.value.status, refusal.value.code) == (500, "canary_failed")
    assert residency.resident_keys()[-1][1] is None
    # Its slot is free again.
    assert residency.acquire(target_of(models, "two")).slot == 0


def test_the_canary_catches_a_delta_that_is_not_applied(models, residency, verified, monkeypatch):
    monkeypatch.setattr(SharedExecutor, "load", lambda *_args, **_kwargs: -1)
    monkeypatch.setattr(SharedExecutor, "size_bytes", lambda *_args: 0)
    with pytest.raises(ApiError) as refusal:
        residency.acquire(with_report(models, verified, "one"))
    assert refusal.value.code == "canary_failed"


EMPTY = '{"canary": {"version": 1, "tokens": [], "ids": [], "logits": [], "backbone": []}}'


@pytest.mark.parametrize("text", ["{", '{"canary": {"version": 1}}', EMPTY])
def test_a_damaged_report_is_refused(models, residency, tmp_path, text):
    (tmp_path / "verification.json").write_text(text)
    with pytest.raises(ApiError) as refusal:
        residency.acquire(with_report(models, tmp_path / "verification.json", "one"))
    assert refusal.value.code == "canary_damaged"


def test_reports_without_a_canary_or_with_a_later_one_are_served_unproven(models, tmp_path, blobs):
    for number, text in enumerate(("{}", '{"canary": {"version": 99}}')):
        (tmp_path / "verification.json").write_text(text)
        residency = open_residency(models, blobs, tmp_path / str(number))
        model = residency.acquire(with_report(models, tmp_path / "verification.json", "one"))
        assert model.canary.state == "absent"
        residency.close()


def test_a_canary_that_rounding_could_fake_proves_nothing():
    from deltacome_core.canary import Canary

    near = Canary(version=1, tokens=(1,), ids=(0, 1), logits=(5.0, 4.0), backbone=(5.001, 4.0))
    result = judge(near, torch.tensor([5.0, 4.0]), dtype=torch.float32)
    assert result.state == "indistinct"
    with pytest.raises(ApiError):
        judge(near, torch.tensor([5.5, 4.0]), dtype=torch.float32)
