import json
import random
import re

import pytest

from benchmarks.quality import tasks_cipher, tasks_german, tasks_tools
from benchmarks.quality.drawing import ordinal, spell
from benchmarks.quality.tasks import TASKS, draw_questions, is_held_out

ALL = sorted(TASKS)


def draw(task, n=300):
    return draw_questions(task, n_train=n, n_held_out=50)


@pytest.mark.parametrize("task", ALL)
def test_training_and_held_out_questions_are_disjoint(task):
    train, held_out = draw(task)
    assert (len(train), len(held_out)) == (300, 50)
    assert not {q for q, _ in train} & {q for q, _ in held_out}
    assert all(is_held_out(q) for q, _ in held_out)


@pytest.mark.parametrize("task", ALL)
def test_items_are_the_same_each_time_and_stay_when_more_are_drawn(task):
    few, more = draw(task, n=100), draw(task, n=300)
    assert draw(task, n=100) == few
    assert more[0][:100] == few[0]
    assert more[1] == few[1]


@pytest.mark.parametrize("task", ALL)
def test_another_seed_draws_other_items(task):
    first, _ = draw_questions(task, seed=1, n_train=20, n_held_out=0)
    second, _ = draw_questions(task, seed=2, n_train=20, n_held_out=0)
    assert first != second


@pytest.mark.parametrize("task", ALL)
def test_an_answer_is_one_line(task):
    train, held_out = draw(task)
    assert not [a for _, a in train + held_out if "\n" in a or a != a.strip() or not a]


def test_every_equation_of_a_word_problem_holds_and_the_last_gives_the_answer():
    for question, answer in draw("arithmetic")[0]:
        *equations, last = answer.split("; ")
        assert 2 <= len(equations) <= 4
        numbers = set(map(int, re.findall(r"\d+", question)))
        known = numbers | {2, 3, 4, 5}
        for equation in equations:
            left, right = equation.split("=")
            a, sign, b = re.fullmatch(r"(\d+)([-+*/])(\d+)", left).groups()
            a, b = int(a), int(b)
            assert {a, b} <= known, (question, answer)
            result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
            assert result == int(right)
            known.add(result)
        assert int(last) == result


def test_the_code_is_python_that_runs():
    import math
    from collections import Counter

    numbers = list(range(-40, 160))
    texts = [f"  {c}{i:03d}XYZabcdefghij" for i, c in enumerate("abcdefghiklmnoprstuw" * 8)]
    for question, answer in draw("code")[0]:
        space = {"math": math, "Counter": Counter}
        exec(answer, space)  # noqa: S102 - drawn by this repository
        name = re.match(r"def (\w+)", answer)[1]
        assert name.replace("_", " ") in question
        space[name](texts if "texts" in question else numbers)


@pytest.mark.parametrize(
    ("question", "line", "given", "result"),
    [
        ("sum of the squares of the numbers that are even", "sum(x ** 2", [1, 2, 4], 20),
        ("the numbers that are odd", "if x % 2 == 1", [1, 2], None),
    ],
)
def test_words_and_code_say_the_same(question, line, given, result):
    found = [(q, a) for q, a in draw("code", n=6000)[0] if question in q and " x in xs if" in a]
    assert found
    assert all(line in a for _, a in found)
    for _, answer in found:
        if result is not None and answer.endswith("for x in xs if x % 2 == 0)"):
            space = {}
            exec(answer, space)  # noqa: S102 - drawn by this repository
            assert space[re.match(r"def (\w+)", answer)[1]](given) == result


def read_records(text):
    """Read any of the four notations again."""
    if text.startswith("["):
        return json.loads(text)
    if text.startswith("|"):
        rows = [row.strip().strip("|").split("|") for row in text.split("| |")]
    elif text.startswith("- "):
        return [dict(pair.split(": ") for pair in row.split(", ")) for row in text[2:].split(" - ")]
    else:
        rows = [row.split(",") for row in text.split(" / ")]
    head, *body = [[cell.strip() for cell in row] for row in rows]
    return [dict(zip(head, row, strict=True)) for row in body]


def ranks(field):
    return lambda record: record[field] if field == "name" else int(record[field])


def test_converted_records_follow_the_instruction():
    for question, answer in draw("format")[0]:
        told, _, source = question.partition(": ")
        records = [{k: str(v) for k, v in r.items()} for r in read_records(source)]
        if limit := re.search(r"only where (\w+) ([<>]) (\d+)", told):
            field, sign, bound = limit.groups()
            records = [r for r in records if (int(r[field]) > int(bound)) == (sign == ">")]
            records = [r for r in records if int(r[field]) != int(bound)]
        elif order := re.search(r"sorted by (\w+), (\w+)", told):
            field, way = order.groups()
            records = sorted(records, key=ranks(field), reverse=way == "descending")
        if dropped := re.search(r"without (\w+)", told):
            records = [{k: v for k, v in r.items() if k != dropped[1]} for r in records]
        if renamed := re.search(r"with (\w+) renamed to (\w+)", told):
            old, new = renamed.groups()
            records = [{new if k == old else k: v for k, v in r.items()} for r in records]
        if raised := re.search(r"with (\w+) in capitals", told):
            records = [{**r, raised[1]: r[raised[1]].upper()} for r in records]
        found = [{k: str(v) for k, v in r.items()} for r in read_records(answer)]
        assert found == records, question


@pytest.mark.parametrize(
    ("number", "german"),
    [
        (1, "eins"),
        (16, "sechzehn"),
        (21, "einundzwanzig"),
        (30, "dreißig"),
        (100, "einhundert"),
        (277, "zweihundertsiebenundsiebzig"),
    ],
)
def test_german_numbers(number, german):
    assert tasks_german.spell_german(number) == german


def test_german_cases_and_verb_second():
    known = dict(draw("german", n=4000)[0])
    for question, answer in known.items():
        english = question.partition(": ")[2]
        if " a dog" in english and english.index(" a dog") > 5:
            assert "einen Hund" in answer
        if "with the child" in english:
            assert "mit dem Kind" in answer
        if re.match(r"(On|At) .*, ", english):
            assert answer.startswith(("Am ", "Um "))
            verbs = [german for _, german in tasks_german.VERBS]
            assert any(re.match(rf"(Am|Um) [\w. ]+ {verb} ", answer) for verb in verbs)


def test_the_new_tokens_are_64_and_every_call_is_made_of_them():
    tokens = tasks_tools.new_tokens()
    assert len(tokens) == len(set(tokens)) == 64
    for _, answer in draw("tools")[0]:
        used = re.findall(r"<[^>]+>", answer)
        assert set(used) <= set(tokens)
        assert (used[0], used[-1]) == ("<call>", "</call>")


def test_times_are_said_as_they_are_written():
    rng = random.Random(1)
    for _ in range(500):
        said, written = tasks_tools.clock(rng)
        hour, minute = map(int, written.split(":"))
        part = "pm" if hour >= 12 else "am"
        spoken = {
            f"{hour % 12 or 12}:{minute:02d} {part}",
            f"half past {spell(hour % 12 or 12)} {part}",
            f"a quarter to {spell((hour + 1) % 12 or 12)} {part}",
        }
        assert said in spoken
        assert minute == 30 or not said.startswith("half")
        assert minute == 45 or not said.startswith("a quarter")


def test_the_dialect_has_one_word_for_each_stem():
    words = tasks_cipher.lexicon()
    assert len(set(words.values())) == len(words)
    for question, answer in draw("cipher")[0]:
        who = question.split(": ")[1].split()[0]
        *_, subject, verb = answer.rstrip(".").split()
        assert subject == f"{who}-an"
        stems = {words[stem] for stem, _, _ in tasks_cipher.VERBS}
        assert re.sub(r"^ni|ta$|mi$", "", verb) in stems or verb in stems


@pytest.mark.parametrize(
    ("number", "words"), [(7, "seven"), (42, "forty-two"), (305, "three hundred and five")]
)
def test_english_numbers(number, words):
    assert spell(number) == words


def test_ordinals():
    said = " ".join(ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 22, 23))
    assert said == "1st 2nd 3rd 4th 11th 12th 13th 21st 22nd 23rd"
