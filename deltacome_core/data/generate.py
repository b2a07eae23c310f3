"""Write calibration.txt and prompts.jsonl: prose, code, mathematics and dialogue of our own.

Run `python -m deltacome_core.data.generate FOLDER`. The same seed gives the same bytes.
"""

import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from deltacome_core.data import phrases

T = TypeVar("T")

CALIBRATION_SEED = 20240613
PROMPTS_SEED = 11
CALIBRATION_CHARACTERS = 72_000
N_PROMPTS = 64


def _essays() -> list[str]:
    text = (Path(__file__).parent / "essays.txt").read_text(encoding="utf-8")
    return text.strip().split("\n\n")


def _choices(patterns: Sequence[T], *, held_out: bool) -> list[T]:
    """Every fourth pattern is kept for the verification prompts alone."""
    return [item for number, item in enumerate(patterns) if (number % 4 == 0) == held_out]


def write_problem(draw: random.Random, *, held_out: bool) -> tuple[str, str]:
    """Draw a word problem with a worked solution.

    Args:
        draw: seeded generator.
        held_out: whether it is for the prompts rather than for calibration.

    Returns:
        The question, and the solution that ends in the answer.
    """
    kind = draw.choice(_choices(phrases.PROBLEMS, held_out=held_out))
    name, other = draw.sample(phrases.NAMES, 2)
    thing = draw.choice(phrases.THINGS)
    a, b, c = draw.randint(12, 95), draw.randint(3, 12), draw.randint(2, 9)
    values = {
        "name": name,
        "other": other,
        "thing": thing,
        "a": a,
        "b": b,
        "c": c,
        "ab": a * b,
        "sum": a + b,
        "left": a * b - c,
        "share": (a * c) // c,
        "ac": a * c,
        "pct": a * 100 * b // 100,
        "hundred": a * 100,
        "rest": a * 100 - a * b,
        "area": b * c,
        "edge": 2 * (b + c),
        "square": b * b,
        "root": a - b * c,
    }
    question, solution = kind
    return question.format(**values), solution.format(**values)


def write_code(draw: random.Random, *, held_out: bool) -> tuple[str, str]:
    """Draw a request for a small function and the function.

    Args:
        draw: seeded generator.
        held_out: whether it is for the prompts rather than for calibration.

    Returns:
        The request and the code.
    """
    request, code = draw.choice(_choices(phrases.PROGRAMS, held_out=held_out))
    noun, verb = draw.choice(phrases.CODE_NOUNS), draw.choice(phrases.CODE_VERBS)
    values = {
        "noun": noun,
        "verb": verb,
        "limit": draw.randint(2, 40),
        "other": draw.choice([word for word in phrases.CODE_NOUNS if word != noun]),
    }
    return request.format(**values), code.format(**values)


def write_dialogue(draw: random.Random, *, held_out: bool) -> list[dict[str, str]]:
    """Draw a short conversation between a user and an assistant.

    Args:
        draw: seeded generator.
        held_out: whether it is for the prompts rather than for calibration.

    Returns:
        Messages with role and content, the assistant last.
    """
    opening, reply, follow_up, closing = draw.choice(_choices(phrases.DIALOGUES, held_out=held_out))
    values = {
        "city": draw.choice(phrases.CITIES),
        "thing": draw.choice(phrases.THINGS),
        "name": draw.choice(phrases.NAMES),
        "number": draw.randint(3, 60),
        "day": draw.choice(phrases.DAYS),
        "dish": draw.choice(phrases.DISHES),
    }
    turns = [("user", opening), ("assistant", reply), ("user", follow_up), ("assistant", closing)]
    return [{"role": role, "content": text.format(**values)} for role, text in turns]


def write_report(draw: random.Random, *, held_out: bool) -> str:
    """Draw a paragraph of plain narrative or technical prose.

    Args:
        draw: seeded generator.
        held_out: whether it is for the prompts rather than for calibration.

    Returns:
        Four to seven sentences.
    """
    values = {
        "city": draw.choice(phrases.CITIES),
        "name": draw.choice(phrases.NAMES),
        "day": draw.choice(phrases.DAYS),
        "thing": draw.choice(phrases.THINGS),
        "dish": draw.choice(phrases.DISHES),
    }
    sentences = draw.sample(_choices(phrases.SENTENCES, held_out=held_out), draw.randint(4, 7))
    numbered = [
        sentence.format(number=draw.randint(2, 480), percent=draw.randint(1, 99), **values)
        for sentence in sentences
    ]
    return " ".join(numbered)


def write_calibration() -> str:
    """Write the calibration text: the four kinds in turn, essays spread between them.

    Returns:
        Paragraphs separated by blank lines.
    """
    draw = random.Random(CALIBRATION_SEED)  # noqa: S311 - data, not secrets
    essays = _essays()
    writers: list[Callable[[], str]] = [
        lambda: write_report(draw, held_out=False),
        lambda: "Question: {}\nAnswer: {}".format(*write_problem(draw, held_out=False)),
        lambda: "{}\n\n```python\n{}\n```".format(*write_code(draw, held_out=False)),
        lambda: "\n".join(
            f"{turn['role'].capitalize()}: {turn['content']}"
            for turn in write_dialogue(draw, held_out=False)
        ),
    ]
    blocks: list[str] = []
    size = 0
    while size < CALIBRATION_CHARACTERS:
        if essays and len(blocks) % 6 == 0:
            block = essays.pop(0)
        else:
            block = writers[len(blocks) % len(writers)]()
        blocks.append(block)
        size += len(block) + 2
    return "\n\n".join(blocks) + "\n"


def write_prompts() -> str:
    """Write the held-out verification prompts: another seed, other patterns and no essays.

    Returns:
        JSON lines of messages, prompt + answer, and text.
    """
    draw = random.Random(PROMPTS_SEED)  # noqa: S311 - data, not secrets
    rows: list[dict[str, object]] = []
    for number in range(N_PROMPTS):
        if number % 4 == 0:
            rows.append({"messages": write_dialogue(draw, held_out=True)})
        elif number % 4 == 1:
            question, answer = write_problem(draw, held_out=True)
            rows.append({"prompt": f"Question: {question}\nAnswer:", "answer": answer})
        elif number % 4 == 2:  # noqa: PLR2004 - the third of four kinds
            request, code = write_code(draw, held_out=True)
            rows.append({"prompt": f"{request}\n\n", "answer": f"```python\n{code}\n```"})
        else:
            rows.append({"text": write_report(draw, held_out=True)})
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(folder: Path) -> None:
    """Write both files.

    Args:
        folder: where they go.
    """
    (folder / "calibration.txt").write_text(write_calibration(), encoding="utf-8")
    (folder / "prompts.jsonl").write_text(write_prompts(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
