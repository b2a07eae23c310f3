"""How the next token is chosen, and how tokens become text."""

from collections import Counter

import pytest
import tiny
import torch

from workers.engine.generate import Sampling
from workers.engine.sampling import Draw, choose_tokens
from workers.engine.text import TextStream


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


def draw_many(logits, n=4000, **sampling):
    generator = torch.Generator().manual_seed(0)
    draw = Draw(sampling=Sampling(**sampling), counts=Counter(), generator=generator)
    drawn = Counter(choose_tokens(logits.expand(n, -1), [draw] * n).tolist())
    return [drawn[token] / n for token in range(logits.shape[-1])]


def test_sampling_follows_the_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    assert draw_many(logits) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    # The nucleus of 0.75 holds the first two, renormalised.
    assert draw_many(logits, top_p=0.75) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    flat = draw_many(logits, temperature=2.0)
    assert flat[0] < 0.45
    assert flat[3] > 0.08


def test_rows_of_a_step_are_drawn_by_their_own_settings_and_chance():
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.7]] * 4))

    def draws():
        settings = (
            {"temperature": 0.0},
            {"top_p": 0.01, "seed": 3},
            {"seed": 3, "temperature": 3.0},
            {"temperature": 0.0, "presence_penalty": 2.0},
        )
        return [
            Draw(
                sampling=Sampling(**fields),
                counts=Counter({2: 1}),
                generator=torch.Generator().manual_seed(number),
            )
            for number, fields in enumerate(settings)
        ]

    together = choose_tokens(logits, draws()).tolist()
    alone = [
        int(choose_tokens(logits[row : row + 1], [draw])[0]) for row, draw in enumerate(draws())
    ]
    assert together == alone
    assert together[:2] == [2, 2]
    assert together[3] == 1
    assert torch.equal(logits, torch.log(torch.tensor([[0.1, 0.2, 0.7]] * 4)))
