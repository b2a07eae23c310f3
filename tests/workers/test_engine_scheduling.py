import threading
from dataclasses import replace

import pytest
import tiny
import torch
from serving import PROMPT, Heard, answer, make_sequence, wait_for

from deltacome_core.models import load_model
from workers.engine.errors import ApiError
from workers.engine.generate import Failure, Finish
from workers.engine.model import load_backbone, share_backbone
from workers.engine.paging import PAGE_TOKENS
from workers.engine.scheduler import Limits, Scheduler

LONG = tuple(range(50, 77))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tiny.make_model(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["shared", "ahead", "plain"])
def model(folder, request):
    """The same backbone in the shared model, as on a GPU there, and run by its own code."""
    loaded = load_backbone(folder, device="cpu")
    if request.param == "plain":
        return loaded
    shared = share_backbone(loaded, folder, kv_bytes=1 << 22, n_slots=2)
    shared.executor.is_async = request.param == "ahead"
    return shared


@pytest.fixture(params=[False, True], ids=["known", "ahead"])
def with_pages(request):
    return lambda folder, n_pages: share_few(folder, n_pages, ahead=request.param)


def share_few(folder, n_pages, *, ahead):
    """A backbone whose cache holds few pages; `ahead` as on a GPU."""
    loaded = load_backbone(folder, device="cpu")
    page_bytes = PAGE_TOKENS * 2 * 2 * 2 * 16 * 4
    shared = share_backbone(loaded, folder, kv_bytes=page_bytes * n_pages, n_slots=1)
    assert shared.executor.pages.capacity == n_pages
    shared.executor.is_async = ahead
    return shared


@pytest.fixture
def scheduler():
    running = Scheduler(Limits(max_running=4, max_waiting=8, max_waiting_tenant=6))
    running.start()
    yield running
    running.stop()


def expected_ids(folder, prompt, length):
    with torch.inference_mode():
        ids = load_model(folder).generate(
            torch.tensor([prompt]), max_new_tokens=length, do_sample=False
        )
    return ids[0, len(prompt) :].tolist()


@pytest.fixture
def counted(folder, monkeypatch):
    """A backbone as on a GPU, and the tokens that each of its steps was given from there."""
    shared = share_few(folder, 64, ahead=True)
    forward, given = shared.executor.forward, []

    def count(work, tokens=None):
        given.append(None if tokens is None else len(tokens))
        return forward(work, tokens)

    monkeypatch.setattr(shared.executor, "forward", count)
    return shared, given


def test_steps_begin_before_the_tokens_of_the_last_are_read(folder, counted):
    model, given = counted
    scheduler = Scheduler(Limits())
    heard = [Heard(), Heard()]
    lengths = (12, 7)
    scheduler.submit(
        [
            make_sequence(model, one, max_tokens=length)
            for one, length in zip(heard, lengths, strict=True)
        ]
    )
    scheduler.start()
    wait_for(lambda: scheduler.running == 0)
    scheduler.stop()
    wanted = expected_ids(folder, PROMPT, 12)
    assert [one.ids for one in heard] == [wanted, wanted[:7]]
    # One step reads the prompts; those of single tokens take them from the step before.
    assert given == [None] + [2] * 6 + [1] * 5


def test_a_step_too_many_is_never_sent_and_gives_its_pages_back(folder, counted):
    model, given = counted
    wanted = expected_ids(folder, PROMPT, 12)
    at = next(at for at in range(3, 12) if wanted[at] not in wanted[:at])
    ending = replace(model, eos_ids=frozenset({wanted[at]}))
    heard = answer([ending], max_tokens=12)[0]
    assert heard.ids == wanted[: at + 1]
    assert isinstance(heard.end, Finish)
    assert heard.end.reason == "stop"
    assert len(heard.events) == at + 2
    assert len(given) == at + 2
    assert model.executor.pages.used == 0


def test_answers_advance_side_by_side(model):
    events = []
    scheduler = Scheduler(Limits())
    both = [Heard(), Heard()]
    for number, heard in enumerate(both):
        heard.events = _Tagged(events, number)
    scheduler.submit([make_sequence(model, heard) for heard in both])
    scheduler.start()
    wait_for(lambda: scheduler.running == 0)
    scheduler.stop()
    order = [number for number, event in events if not isinstance(event, Finish)]
    assert order == [0, 1] * 12


class _Tagged:
    def __init__(self, events, number):
        self.append = lambda event: events.append((number, event))


def test_company_does_not_change_an_answer(model, folder):
    prompts = (PROMPT, LONG, tuple(range(90, 95)))
    alone = [answer([model], prompt=prompt)[0] for prompt in prompts]
    scheduler = Scheduler(Limits(prefill_tokens=7))
    together = [Heard() for _ in prompts]
    scheduler.submit(
        [make_sequence(model, h, prompt=p) for h, p in zip(together, prompts, strict=True)]
    )
    scheduler.start()
    wait_for(lambda: scheduler.running == 0)
    scheduler.stop()
    assert [heard.ids for heard in together] == [heard.ids for heard in alone]
    assert together[1].ids == expected_ids(folder, LONG, 12)


def test_a_prompt_read_in_pieces_gives_the_same_answer(model):
    answers = [
        answer([model], prompt=LONG, limits=Limits(prefill_tokens=size))[0].ids
        for size in (1, 3, 64)
    ]
    assert answers[0] == answers[1] == answers[2]


def test_a_long_prompt_is_read_in_larger_pieces_while_nobody_decodes(model, monkeypatch):
    forward, steps = model.executor.forward, []

    def note(work, tokens=None):
        steps.append([item.count for item in work])
        return forward(work, tokens)

    monkeypatch.setattr(model.executor, "forward", note)
    prompt = tuple(20 + at % 70 for at in range(60))
    answer([model], prompt=prompt, limits=Limits(prefill_tokens=5), max_tokens=2)
    assert steps[0] == [40]
    assert steps[1] == [20]
    steps.clear()
    scheduler = Scheduler(Limits(prefill_tokens=5))
    heard = [Heard(), Heard()]
    # The short one decodes while the long one is read.
    scheduler.start()
    scheduler.submit([make_sequence(model, heard[0], max_tokens=200)])
    wait_for(lambda: heard[0].pieces)
    scheduler.submit([make_sequence(model, heard[1], prompt=prompt[::-1], tenant="long")])
    wait_for(lambda: scheduler.running == 0)
    scheduler.stop()
    beside = [step for step in steps if len(step) == 2 and max(step) > 1]
    assert beside
    assert max(max(step) for step in beside) <= 5


def test_the_scores_of_a_prompt_do_not_depend_on_how_it_was_read(model, folder):
    truth = torch.log_softmax(load_model(folder)(torch.tensor([LONG])).logits[0], dim=-1)
    for size in (4, 64):
        heard = answer(
            [model], prompt=LONG, echo=True, logprobs=2, limits=Limits(prefill_tokens=size)
        )[0]
        scored = heard.pieces[: len(LONG)]
        assert heard.ids[: len(LONG)] == list(LONG)
        assert scored[0].logprob is None
        expected = [float(truth[at, token]) for at, token in enumerate(LONG[1:])]
        assert [piece.logprob for piece in scored[1:]] == pytest.approx(expected, abs=1e-4)
        assert all(len(piece.top_ids) == len(piece.top) == 2 for piece in scored[1:])


def test_a_cancelled_answer_leaves_and_frees_its_pages(model, scheduler):
    heard = Heard()
    pages = model.executor.pages
    sequence = make_sequence(model, heard, max_tokens=200)
    scheduler.submit([sequence])
    wait_for(lambda: heard.events)
    assert pages.used > 0
    sequence.cancel()
    wait_for(lambda: scheduler.running == 0)
    assert pages.used == 0
    assert not heard.ended


def test_an_answer_that_fails_leaves_the_others_alone(model, scheduler):
    bad, good = Heard(), Heard()
    # A negative id is in no table: the step raises, and is repeated answer by answer.
    broken = make_sequence(model, bad, prompt=(-(10**6),))
    scheduler.submit([broken, make_sequence(model, good)])
    wait_for(lambda: good.ended and bad.ended)
    assert isinstance(bad.end, Failure)
    assert good.ids == answer([model])[0].ids
    wait_for(lambda: scheduler.running == 0)
    assert model.executor.pages.used == 0


def hold_steps(monkeypatch, model):
    gate = threading.Event()
    forward = type(model.executor).forward

    def wait(executor, work):
        gate.wait(60)
        return forward(executor, work)

    monkeypatch.setattr(type(model.executor), "forward", wait)
    return gate


def test_a_full_queue_refuses_with_429_and_a_time_to_come_back(model, scheduler, monkeypatch):
    gate = hold_steps(monkeypatch, model)
    scheduler.submit([make_sequence(model, Heard()) for _ in range(4)])
    wait_for(lambda: scheduler.waiting == 0)
    scheduler.submit([make_sequence(model, Heard(), tenant="hot") for _ in range(6)])
    with pytest.raises(ApiError) as refusal:
        scheduler.submit([make_sequence(model, Heard(), tenant="hot")])
    assert (refusal.value.status, refusal.value.code) == (429, "model_busy")
    # The others' part of the queue is still open, until all of it is taken.
    scheduler.submit([make_sequence(model, Heard(), tenant="cold") for _ in range(2)])
    with pytest.raises(ApiError) as refusal:
        scheduler.submit([make_sequence(model, Heard(), tenant="third")])
    assert (refusal.value.status, refusal.value.code) == (429, "engine_busy")
    assert int(refusal.value.headers()["retry-after"]) >= 1
    assert scheduler.running == 12
    gate.set()
    wait_for(lambda: scheduler.running == 0)


def test_a_request_is_taken_whole_or_not_at_all(model, scheduler, monkeypatch):
    gate = hold_steps(monkeypatch, model)
    scheduler.submit([make_sequence(model, Heard()) for _ in range(4)])
    wait_for(lambda: scheduler.waiting == 0)
    # Larger than the queue, but nothing is before it.
    scheduler.submit([make_sequence(model, Heard()) for _ in range(10)])
    with pytest.raises(ApiError):
        scheduler.submit([make_sequence(model, Heard()) for _ in range(2)])
    assert scheduler.running == 14
    gate.set()
    wait_for(lambda: scheduler.running == 0)


def test_an_answer_that_the_cache_can_never_hold_is_refused(folder, with_pages):
    model = with_pages(folder, 4)
    scheduler = Scheduler(Limits())
    with pytest.raises(ApiError) as refusal:
        scheduler.submit([make_sequence(model, Heard(), max_tokens=63)])
    assert refusal.value.code == "context_length_exceeded"
    scheduler.submit([make_sequence(model, Heard(), max_tokens=62)])


def test_answers_that_outgrow_the_cache_wait_for_pages_and_say_the_same(folder, with_pages):
    roomy, tight = with_pages(folder, 64), with_pages(folder, 6)
    alone = [answer([roomy], prompt=(60 + n, 61, 62), max_tokens=60)[0].ids for n in range(4)]
    scheduler = Scheduler(Limits())
    heard = [Heard() for _ in range(4)]
    scheduler.submit(
        [
            make_sequence(tight, one, prompt=(60 + n, 61, 62), max_tokens=60, tenant=f"t{n % 2}")
            for n, one in enumerate(heard)
        ]
    )
    scheduler.start()
    wait_for(lambda: scheduler.running == 0)
    scheduler.stop()
    assert [one.ids for one in heard] == alone
    assert scheduler._metrics.preemptions.value() > 0
    assert tight.executor.pages.used == 0


def test_an_answer_that_was_pushed_out_does_not_score_its_prompt_twice(folder, with_pages):
    roomy, tight = with_pages(folder, 64), with_pages(folder, 6)
    alone = answer([roomy], prompt=LONG, max_tokens=40, echo=True, logprobs=1)[0]
    heard = answer([tight] * 3, prompt=LONG, max_tokens=40, echo=True, logprobs=1)
    for one in heard:
        assert one.ids == alone.ids
        assert [p.logprob for p in one.pieces[1:]] == pytest.approx(
            [p.logprob for p in alone.pieces[1:]], abs=1e-4
        )


def test_a_draining_engine_answers_what_it_has_and_takes_nothing_new(model, monkeypatch):
    gate = hold_steps(monkeypatch, model)
    scheduler = Scheduler(Limits(max_running=1))
    heard = [Heard(), Heard()]
    scheduler.start()
    scheduler.submit([make_sequence(model, one) for one in heard])
    scheduler.stop_admitting()
    with pytest.raises(ApiError) as refusal:
        scheduler.submit([make_sequence(model, Heard())])
    assert (refusal.value.status, refusal.value.code) == (503, "engine_stopping")
    assert not scheduler.drain(0.05)
    gate.set()
    assert scheduler.drain(60)
    assert all(one.ended and isinstance(one.end, Finish) for one in heard)
    scheduler.stop()


def test_an_engine_that_stops_tells_who_still_waits(model, monkeypatch):
    gate = hold_steps(monkeypatch, model)
    scheduler = Scheduler(Limits(max_running=1))
    heard = [Heard(), Heard()]
    scheduler.start()
    scheduler.submit([make_sequence(model, one, max_tokens=200) for one in heard])
    assert not scheduler.drain(0)
    threading.Timer(0.2, gate.set).start()
    scheduler.stop()
    assert isinstance(heard[1].end, Failure)
    assert heard[1].end.error.code == "engine_stopping"


def test_penalties_keep_a_greedy_answer_from_repeating(model):
    def count_repeats(**sampling):
        ids = answer([model], max_tokens=60, **sampling)[0].ids
        return len(ids) - len(set(ids))

    assert count_repeats(frequency_penalty=2.0, presence_penalty=2.0) < count_repeats()


def test_scores_are_those_before_temperature_and_penalties(model):
    plain = answer([model], logprobs=1, max_tokens=2)[0].pieces
    changed = answer([model], logprobs=1, max_tokens=2, presence_penalty=0.001)[0].pieces
    assert [p.logprob for p in plain] == pytest.approx([p.logprob for p in changed], abs=1e-6)


def test_choices_of_one_seed_differ_from_each_other_and_repeat(model):
    def draw(choice):
        return answer([model], temperature=1.5, seed=5, choice=choice)[0].ids

    assert draw(0) == draw(0) != draw(1) == draw(1)


def test_a_stop_string_ends_an_answer_and_is_named(model):
    text = "".join(piece.text for piece in answer([model], max_tokens=40)[0].pieces)
    stop = text[4:6]
    heard = answer([model], max_tokens=40, stop=("never", stop))[0]
    assert heard.end.stop == stop
    assert "".join(p.text for p in heard.pieces) + heard.end.text == text[: text.index(stop)]
