"""Prompts that begin alike: what one answer has read is found by the others."""

from dataclasses import replace

import pytest
import tiny
from serving import Heard, answer, make_sequence, wait_for

from deltacome_core.errors import InternalError
from workers.engine.model import load_backbone, share_backbone
from workers.engine.paging import PAGE_TOKENS, PagePool, extend_keys
from workers.engine.scheduler import Limits, Scheduler

# Two full pages and a bit.
LONG = tuple(30 + at % 60 for at in range(2 * PAGE_TOKENS + 5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tiny.make_model(), tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["known", "ahead"])
def model(folder, request):
    loaded = load_backbone(folder, device="cpu")
    shared = share_backbone(loaded, folder, kv_bytes=1 << 20, n_slots=2)
    shared.executor.is_async = request.param == "ahead"
    return shared


@pytest.fixture
def read(model, monkeypatch):
    """How many tokens each step was given."""
    forward, counts = model.executor.forward, []

    def count(work, tokens=None):
        counts.append(sum(item.count for item in work))
        return forward(work, tokens)

    monkeypatch.setattr(model.executor, "forward", count)
    return counts


def ask(scheduler, model, **options):
    heard = Heard()
    scheduler.submit([make_sequence(model, heard, **options)])
    wait_for(lambda: heard.ended and scheduler.running == 0)
    return heard


@pytest.fixture
def scheduler():
    running = Scheduler(Limits())
    running.start()
    yield running
    running.stop()


def test_a_prompt_is_read_once_and_the_answer_is_the_same(model, read, scheduler):
    first = ask(scheduler, model, prompt=LONG)
    n_first = read[0]
    read.clear()
    second = ask(scheduler, model, prompt=LONG)
    assert second.ids == first.ids
    assert (n_first, read[0]) == (len(LONG), len(LONG) - 2 * PAGE_TOKENS)
    assert scheduler._metrics.found_tokens.value() == 2 * PAGE_TOKENS
    assert model.executor.pages.used == 0


def test_a_chat_goes_on_behind_its_own_answer(model, read, scheduler):
    heard = ask(scheduler, model, prompt=LONG, max_tokens=20)
    longer = (*LONG, *heard.ids, 33, 34)
    read.clear()
    found = ask(scheduler, model, prompt=longer)
    # The last token of an answer is chosen, but need not have been fed.
    assert read[0] == len(longer) - (len(LONG) + 19) // PAGE_TOKENS * PAGE_TOKENS
    read.clear()
    assert found.ids == answer([replace(model, key="another")], prompt=longer)[0].ids
    assert read[0] == len(longer)


def test_choices_of_one_prompt_wait_for_the_one_that_reads_it(model, read):
    alone = answer([replace(model, key="alone")], prompt=LONG)[0].ids
    read.clear()
    heard = answer([model] * 4, prompt=LONG, limits=Limits(prefill_tokens=40))
    assert [one.ids for one in heard] == [alone] * 4
    rest = len(LONG) - 2 * PAGE_TOKENS
    # What is left to the three comes together with the second token of the first.
    assert read[:2] == [len(LONG), 3 * rest + 1]


def test_models_do_not_share_what_they_read(model, read, scheduler):
    ask(scheduler, model, prompt=LONG)
    for other in (replace(model, key="other"), replace(model, slot=1)):
        extend_keys(keys := [], f"{other.key}/{other.slot}", LONG, 2)
        assert model.executor.pages.find(keys) == []
    read.clear()
    ask(scheduler, replace(model, key="other"), prompt=LONG)
    assert read[0] == len(LONG)


def test_a_prompt_that_is_scored_is_read_whole(model, read, scheduler):
    ask(scheduler, model, prompt=LONG)
    read.clear()
    heard = ask(scheduler, model, prompt=LONG, echo=True, logprobs=1)
    assert read[0] == len(LONG)
    assert len([piece for piece in heard.pieces if piece.logprob is not None]) == len(LONG) + 11


def test_pages_of_others_make_room_for_new_ones():
    pool = PagePool(4)
    pages = pool.take(3)
    extend_keys(keys := [], "a", LONG * 2, 3)
    for page, key in zip(pages, keys, strict=True):
        pool.name(page, key)
    pool.give_back(pages)
    assert (pool.free, pool.used) == (4, 0)
    # The end of a text goes first.
    taken = pool.take(2)
    assert pages[2] in taken
    assert pool.find(keys) == pages[:2]
    assert pool.used == 4
    assert pool.take(1) is None
    pool.give_back(pages[:2])
    pool.give_back(taken)
    assert pool.used == 0


def test_a_page_is_kept_until_its_last_holder_lets_go():
    pool = PagePool(2)
    pages = pool.take(1)
    extend_keys(keys := [], "a", LONG, 1)
    pool.name(pages[0], keys[0])
    assert pool.find(keys) == pages
    pool.give_back(pages)
    assert pool.used == 1
    assert pool.take(2) is None
    pool.give_back(pages)
    assert pool.used == 0
    with pytest.raises(InternalError):
        pool.give_back(pages)


def test_names_tell_texts_and_owners_apart():
    def keys(owner, tokens):
        extend_keys(found := [], owner, tokens, len(tokens) // PAGE_TOKENS)
        return found

    later = list(LONG)
    later[PAGE_TOKENS] += 1
    assert keys("a", LONG)[0] == keys("a", later)[0]
    assert keys("a", LONG)[1] != keys("a", later)[1]
    assert not set(keys("a", LONG)) & set(keys("b", LONG))
