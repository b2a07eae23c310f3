"""What the engine prepares while nobody asks."""

import gc
import threading

import pytest
import tiny
import torch
from serving import Heard, make_sequence, wait_for

from workers.engine.attention import DecodeRows
from workers.engine.graphs import DecodeGraphs, StepInputs
from workers.engine.model import load_backbone, share_backbone
from workers.engine.parts import TenantParts
from workers.engine.quiet import QuietWork
from workers.engine.rooms import BUCKETS
from workers.engine.scheduler import Limits, Scheduler


@pytest.fixture
def model(tmp_path):
    folder = tiny.save(tiny.make_model(), tmp_path)
    return share_backbone(load_backbone(folder, device="cpu"), folder, kv_bytes=1 << 22, n_slots=2)


@pytest.fixture
def scheduler():
    running = Scheduler(Limits())
    running.start()
    yield running
    running.stop()


def ask(scheduler, model):
    heard = Heard()
    scheduler.submit([make_sequence(model, heard, max_tokens=3)])
    return heard


def test_steps_are_prepared_one_by_one_until_none_is_left(model, scheduler, monkeypatch):
    left = [True, True, True, False]
    monkeypatch.setattr(model.executor, "prepare_step", lambda: left.pop(0))
    ask(scheduler, model)
    wait_for(lambda: scheduler.is_prepared)
    assert left == []


def test_who_asks_meanwhile_is_answered_before_the_rest_is_prepared(model, scheduler, monkeypatch):
    events, begun, go_on = [], threading.Event(), threading.Event()
    forward = model.executor.forward

    def prepare():
        events.append("prepare")
        begun.set()
        assert go_on.wait(30)
        return events.count("prepare") < 3

    def step(work, tokens=None):
        events.append("step")
        return forward(work, tokens)

    monkeypatch.setattr(model.executor, "prepare_step", prepare)
    monkeypatch.setattr(model.executor, "forward", step)
    ask(scheduler, model)
    assert begun.wait(30)
    second = ask(scheduler, model)
    go_on.set()
    wait_for(lambda: scheduler.is_prepared)
    assert len(second.ids) == 3
    steps = ["step"] * 3
    assert events == [*steps, "prepare", *steps, "prepare", "prepare"]


def test_what_cannot_be_prepared_stops_no_answer(model, scheduler, monkeypatch):
    calls = []

    def fail():
        calls.append(1)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model.executor, "prepare_step", fail)
    for number in (1, 2):
        heard = ask(scheduler, model)
        wait_for(lambda: scheduler.is_prepared)
        assert len(heard.ids) == 3
        # It is not tried again before the next answer.
        assert len(calls) == number


def test_nothing_is_prepared_while_the_engine_stops(model, scheduler, monkeypatch):
    calls = []
    monkeypatch.setattr(model.executor, "prepare_step", lambda: calls.append(1))
    ask(scheduler, model)
    assert scheduler.drain(30)
    scheduler.stop()
    assert calls == []


def test_an_executor_that_is_gone_is_not_kept():
    class Executor:
        def prepare_step(self):
            return True

    quiet, executor = QuietWork(), Executor()
    quiet.expect(executor)
    assert quiet
    del executor
    gc.collect()
    assert not quiet


class Graphs:
    """Notes which steps it was given instead of capturing them."""

    def __init__(self, hidden):
        self.seen = []
        self._hidden = hidden

    def lacks(self, n_rows, *, key):
        return (n_rows, key) not in self.seen

    def run(self, inputs, *, key):
        n_rows = inputs.embeds.shape[1]
        self.seen.append((n_rows, key))
        # Only what nobody reads is written.
        assert inputs.places.tolist() == [0] * n_rows
        return torch.zeros(n_rows, self._hidden)


def test_steps_of_the_backbone_come_first_and_of_deltas_when_one_is_resident(tmp_path):
    from workers.engine.shared import SharedExecutor

    folder = tiny.save(tiny.make_model(), tmp_path)
    module = load_backbone(folder, device="cpu").module
    executor = SharedExecutor(module, folder, device="cpu", kv_bytes=1 << 22, n_slots=2, arena=True)
    assert not executor.prepare_step()
    graphs = executor._graphs = Graphs(module.config.hidden_size)
    executor._pads = True
    n_prepared = 0
    while executor.prepare_step():
        n_prepared += 1
    largest_first = list(reversed(BUCKETS))
    assert graphs.seen == [(size, (0, False)) for size in largest_first]
    assert n_prepared == len(BUCKETS)
    slot = executor.load(TenantParts())
    graphs.seen.clear()
    executor._is_loading = True
    assert not executor.prepare_step()
    executor._is_loading = False
    while executor.prepare_step():
        pass
    assert graphs.seen == [(size, (1, True)) for size in largest_first]
    executor.evict(slot)
    graphs.seen.clear()
    assert not executor.prepare_step()
    assert executor.pages.used == 0


@pytest.mark.parametrize(
    ("said", "is_tried_again"), [("CUBLAS_STATUS_ALLOC_FAILED", True), ("not permitted", False)]
)
def test_a_size_that_found_no_memory_is_tried_again(said, is_tried_again, monkeypatch):
    """What a driver will not do it will not do later; memory may be there by then."""
    returned = []
    for name, give in (
        ("mem_get_info", lambda: (0, 1)),
        ("memory_reserved", lambda: 3),
        ("memory_allocated", lambda: 1),
        ("empty_cache", lambda: returned.append(True)),
    ):
        monkeypatch.setattr(torch.cuda, name, give)
    graphs = DecodeGraphs(lambda inputs: inputs.embeds[0] + 1, n_pages=2)

    def capture(_inputs):
        raise RuntimeError(said)

    monkeypatch.setattr(graphs, "_capture", capture)
    numbers = torch.zeros(2, dtype=torch.int32)
    decode = DecodeRows(pages=numbers[:, None], lengths=numbers + 1)
    rows = {"places": numbers, "owners": numbers, "chunks": (), "decode": decode}
    step = StepInputs(embeds=torch.zeros(1, 2, 4), positions=numbers[None], **rows)
    assert torch.equal(graphs.run(step, key=("one", True)), torch.ones(2, 4))
    assert graphs.lacks(2, key=("one", True)) == is_tried_again
    assert bool(returned) == is_tried_again
