import threading
import time

import pytest
import tiny
import torch

from workers.engine.errors import ApiError
from workers.engine.generate import Failure, Finish, Piece, Sampling, Sequence
from workers.engine.model import load_backbone
from workers.engine.scheduler import Scheduler
from workers.engine.text import TextStream


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.save(tiny.make_model(), tmp_path_factory.mktemp("model"))
    return load_backbone(folder, device="cpu")


@pytest.fixture
def scheduler():
    running = Scheduler(max_sequences=4)
    running.start()
    yield running
    running.stop()


def make_sequence(model, emit, *, prompt=(40, 41, 42), max_tokens=12, **sampling):
    return Sequence(
        model,
        prompt,
        sampling=Sampling(**{"temperature": 0.0} | sampling),
        max_tokens=max_tokens,
        score_prompt=False,
        prefill_chunk=4,
        emit=emit,
    )


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def ids_of(events):
    return [event.token_id for event in events if isinstance(event, Piece)]


def test_two_sequences_take_turns(model, scheduler):
    events = []
    both = [make_sequence(model, lambda event, n=n: events.append((n, event))) for n in (0, 1)]
    scheduler.submit(both)
    wait_for(lambda: sum(isinstance(event, Finish) for _, event in events) == 2)
    order = [number for number, event in events if isinstance(event, Piece)]
    assert order == [0, 1] * 12


def test_company_does_not_change_an_answer(model, scheduler):
    alone, first, second = [], [], []
    scheduler.submit([make_sequence(model, alone.append)])
    wait_for(lambda: any(isinstance(event, Finish) for event in alone))
    other = make_sequence(model, second.append, prompt=tuple(range(60, 90)))
    scheduler.submit([make_sequence(model, first.append), other])
    wait_for(lambda: isinstance((first or [None])[-1], Finish))
    assert ids_of(first) == ids_of(alone)


def test_a_prompt_read_in_chunks_gives_the_same_answer(model):
    answers = []
    for chunk in (1, 3, 64):
        events = []
        sequence = make_sequence(model, events.append, prompt=tuple(range(50, 77)))
        sequence._chunk = chunk
        while not sequence.finished:
            sequence.step()
        answers.append(ids_of(events))
    assert answers[0] == answers[1] == answers[2]


def test_a_cancelled_sequence_leaves(model, scheduler):
    events = []
    sequence = make_sequence(model, events.append, max_tokens=200)
    scheduler.submit([sequence])
    wait_for(lambda: events)
    sequence.cancel()
    wait_for(lambda: scheduler.running == 0)
    assert not any(isinstance(event, Finish) for event in events)


def test_a_sequence_that_fails_leaves_the_others_alone(model, scheduler):
    bad, good = [], []
    # An id outside the vocabulary: the embedding raises in the middle of the forward pass.
    broken = make_sequence(model, bad.append, prompt=(10**6,))
    scheduler.submit([broken, make_sequence(model, good.append)])
    wait_for(lambda: any(isinstance(event, Finish) for event in good))
    assert isinstance(bad[-1], Failure)
    wait_for(lambda: scheduler.running == 0)


def test_a_request_is_taken_whole_or_not_at_all(model, scheduler):
    gate = threading.Event()

    def hold(_event):
        gate.wait(20)

    scheduler.submit([make_sequence(model, hold) for _ in range(3)])
    with pytest.raises(ApiError) as refusal:
        scheduler.submit([make_sequence(model, hold) for _ in range(2)])
    assert refusal.value.code == "engine_busy"
    assert scheduler.running == 3
    gate.set()


def test_penalties_keep_a_greedy_answer_from_repeating(model):
    def count_repeats(**sampling):
        events = []
        sequence = make_sequence(model, events.append, max_tokens=60, **sampling)
        while not sequence.finished:
            sequence.step()
        ids = ids_of(events)
        return len(ids) - len(set(ids))

    assert count_repeats(frequency_penalty=2.0, presence_penalty=2.0) < count_repeats()


def test_text_waits_until_a_character_is_whole():
    tokenizer = tiny.make_tokenizer()
    ids = tokenizer("né ☃!")["input_ids"]
    stream = TextStream(tokenizer, ())
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == "né ☃!"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert pieces[:3] == ["n", "", "é"]


def test_half_a_character_at_the_end_is_still_shown():
    tokenizer = tiny.make_tokenizer()
    stream = TextStream(tokenizer, ())
    ids = tokenizer("a☃")["input_ids"][:-1]
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == "a"
    assert stream.flush().startswith("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("hello world", ("wor",), "hello "),
        ("hello world", ("xyz",), "hello world"),
        ("aaab", ("aab",), "a"),
        ("abc abd", ("abd",), "abc "),
        ("one\n\ntwo", ("two", "\n\n"), "one"),
    ],
)
def test_the_beginning_of_a_stop_string_is_held_back(text, stops, shown):
    tokenizer = tiny.make_tokenizer()
    stream = TextStream(tokenizer, stops)
    seen = ""
    for token in tokenizer(text)["input_ids"]:
        seen += stream.push(token)
        assert shown.startswith(seen)
        if stream.stopped:
            break
    assert seen + stream.flush() == shown


def test_sampling_follows_the_distribution():
    from collections import Counter

    from workers.engine.generate import choose_token

    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)

    def draw(**sampling):
        drawn = Counter(
            choose_token(logits, Sampling(**sampling), counts=Counter(), generator=generator)
            for _ in range(4000)
        )
        return [drawn[token] / 4000 for token in range(4)]

    assert draw() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    # The nucleus of 0.75 holds the first two, renormalised.
    assert draw(top_p=0.75) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    flat = draw(temperature=2.0)
    assert flat[0] < 0.45
    assert flat[3] > 0.08


def test_choices_of_one_seed_differ_from_each_other_and_repeat(model):
    def answer(choice):
        events = []
        sequence = Sequence(
            model,
            (40, 41, 42),
            sampling=Sampling(temperature=1.5, seed=5, choice=choice),
            max_tokens=12,
            score_prompt=False,
            prefill_chunk=4,
            emit=events.append,
        )
        while not sequence.finished:
            sequence.step()
        return ids_of(events)

    assert answer(0) == answer(0) != answer(1) == answer(1)
