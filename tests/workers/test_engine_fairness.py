"""A tenant that asks for much takes nothing from those who ask for little."""

from collections import Counter

import pytest
import tiny
from serving import Heard, make_sequence, wait_for

from workers.engine.fairness import DeficitRoundRobin
from workers.engine.generate import Finish, Piece
from workers.engine.model import load_backbone, share_backbone
from workers.engine.paging import PAGE_TOKENS
from workers.engine.scheduler import Limits, Scheduler


def test_tenants_that_wait_are_served_equal_amounts_whatever_their_items_cost():
    turns = DeficitRoundRobin(quantum=10)
    served = Counter()
    for _ in range(300):
        costs = {"small": [1] * 50, "large": [10] * 50, "odd": [7] * 50}
        taken = Counter()
        for name in turns.pick(costs, budget=40):
            served[name] += costs[name][taken[name]]
            taken[name] += 1
    total = sum(served.values())
    assert all(amount / total == pytest.approx(1 / 3, abs=0.02) for amount in served.values())


def test_what_one_leaves_the_others_take():
    turns = DeficitRoundRobin(quantum=1)
    chosen = Counter(turns.pick({"a": [1], "b": [1] * 100}, budget=32))
    assert chosen == {"a": 1, "b": 31}


def test_an_item_larger_than_the_quantum_waits_for_credit_but_comes():
    turns = DeficitRoundRobin(quantum=4)
    picked = [turns.pick({"a": [10], "b": [1] * 9}, budget=10) for _ in range(4)]
    assert any("a" in chosen for chosen in picked)


def test_who_waits_for_nothing_saves_no_credit():
    turns = DeficitRoundRobin(quantum=1)
    for _ in range(50):
        turns.pick({"a": [], "b": [1]}, budget=1)
    assert Counter(turns.pick({"a": [1] * 10, "b": [1] * 10}, budget=10)) == {"a": 5, "b": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tiny.make_model(), tmp_path_factory.mktemp("model"))


def run(folder, sequences, *, limits, n_pages=512):
    """Tokens in the order they were sent, as (tenant, event)."""
    page_bytes = PAGE_TOKENS * 2 * 2 * 2 * 16 * 4
    loaded = load_backbone(folder, device="cpu")
    model = share_backbone(loaded, folder, kv_bytes=page_bytes * n_pages, n_slots=1)
    sent = []
    made = []
    for tenant, options in sequences:
        heard = Heard()
        heard.events = _Log(sent, tenant)
        made.append(make_sequence(model, heard, tenant=tenant, **options))
    scheduler = Scheduler(limits)
    for sequence in made:
        scheduler.submit([sequence])
    scheduler.start()
    wait_for(lambda: scheduler.running == 0)
    scheduler.stop()
    return sent


class _Log:
    def __init__(self, sent, tenant):
        self.append = lambda event: sent.append((tenant, event))


def tokens_before_end_of(sent, tenant):
    served = Counter()
    for name, event in sent:
        served[name] += isinstance(event, Piece)
        if name == tenant and isinstance(event, Finish):
            return served
    raise AssertionError("it never ended")


HOT = ("hot", {"max_tokens": 60})
COLD = ("cold", {"max_tokens": 20})


def test_a_cold_tenant_gets_its_share_of_each_step(folder):
    limits = Limits(max_sequences=2, max_waiting_tenant=64)
    served = tokens_before_end_of(run(folder, [HOT] * 12 + [COLD], limits=limits), "cold")
    # Half of each step is the cold tenant's, once the step is over that read all prompts.
    assert served["cold"] > 10
    assert served["hot"] <= served["cold"] + 12


def test_a_cold_tenant_does_not_wait_for_places_that_a_hot_one_fills(folder):
    limits = Limits(max_sequences=4, max_running=4, max_waiting_tenant=64)
    served = tokens_before_end_of(run(folder, [HOT] * 20 + [COLD], limits=limits), "cold")
    # Without a place of its own it would come after 20 answers of 60 tokens.
    assert served["hot"] <= 4 * 24


def test_a_cold_tenant_does_not_wait_for_pages_that_a_hot_one_fills(folder):
    limits = Limits(max_waiting_tenant=64)
    sent = run(folder, [HOT] * 20 + [COLD], limits=limits, n_pages=12)
    assert tokens_before_end_of(sent, "cold")["hot"] <= 12 * 24
    assert sum(isinstance(event, Finish) for _, event in sent) == 21


def test_long_prompts_of_one_tenant_do_not_hold_up_the_prompt_of_another(folder):
    limits = Limits(prefill_tokens=16, max_waiting_tenant=64)
    long = ("hot", {"prompt": tuple(range(40, 240)), "max_tokens": 2})
    sent = run(folder, [long] * 6 + [("cold", {"max_tokens": 2})], limits=limits)
    first = next(name for name, event in sent if isinstance(event, Piece))
    assert first == "cold"
