"""Word problems of two to four steps; the answer shows each equation and ends in the number."""

import random
from collections.abc import Callable

from benchmarks.quality.drawing import NAMES, Question, happens, pick_tailed

THINGS = [
    "apples",
    "books",
    "coins",
    "marbles",
    "stamps",
    "shells",
    "cards",
    "pencils",
    "eggs",
    "plums",
    "buttons",
    "candles",
    "letters",
    "flowers",
    "stones",
    "bottles",
    "tickets",
    "beads",
    "nails",
    "ribbons",
]
LARGEST = 999
Step = Callable[[random.Random, int, str], tuple[str, list[str], int] | None]
"""Told the count so far and who has it: the sentence, its equations and the new count."""


def gain(rng: random.Random, count: int, who: str) -> tuple[str, list[str], int]:
    more = rng.randint(12, 280)
    said = rng.choice(
        (
            f"Then {who} finds {more} more.",
            f"{pick_tailed(rng, NAMES)} gives {who} another {more}.",
            f"{who} buys {more} at the market.",
            f"A parcel with {more} of them arrives.",
        )
    )
    return said, [f"{count}+{more}={count + more}"], count + more


def lose(rng: random.Random, count: int, who: str) -> tuple[str, list[str], int] | None:
    if count < 30:  # noqa: PLR2004 - too few to lose a two-digit number
        return None
    fewer = rng.randint(11, min(count - 5, 280))
    said = rng.choice(
        (
            f"{who} loses {fewer} of them.",
            f"{who} gives {fewer} to {pick_tailed(rng, NAMES)}.",
            f"On Monday {who} sells {fewer}.",
            f"It turns out that {fewer} are broken and thrown away.",
        )
    )
    return said, [f"{count}-{fewer}={count - fewer}"], count - fewer


def multiply(rng: random.Random, count: int, who: str) -> tuple[str, list[str], int] | None:
    factor = rng.randint(2, 5)
    if count * factor > LARGEST:
        return None
    word = ("twice", "three times", "four times", "five times")[factor - 2]
    said = rng.choice(
        (
            f"A year later {who} has {word} as many.",
            f"{who} works hard until there are {word} as many.",
        )
    )
    return said, [f"{count}*{factor}={count * factor}"], count * factor


def divide(rng: random.Random, count: int, who: str) -> tuple[str, list[str], int] | None:
    parts = [n for n in (2, 3, 4, 5, 6, 8) if count % n == 0 and count > 5 * n]
    if not parts:
        return None
    n = rng.choice(parts)
    said = rng.choice(
        (
            f"{who} shares them equally among {n} boxes and keeps one box.",
            f"They are split into {n} equal heaps, of which {who} takes one.",
        )
    )
    return said, [f"{count}/{n}={count // n}"], count // n


def add_boxes(rng: random.Random, count: int, who: str) -> tuple[str, list[str], int] | None:
    boxes, each = rng.randint(3, 12), rng.randint(4, 25)
    added = boxes * each
    if count + added > LARGEST:
        return None
    said = rng.choice(
        (
            f"{who} opens {boxes} boxes with {each} in each.",
            f"{boxes} friends bring {each} each.",
        )
    )
    return said, [f"{boxes}*{each}={added}", f"{count}+{added}={count + added}"], count + added


STEPS: tuple[Step, ...] = (gain, lose, multiply, divide, add_boxes)


def add_distraction(rng: random.Random, sentences: list[str], who: str) -> None:
    said = rng.choice(
        (
            f"{who} is {rng.randint(18, 80)} years old.",
            f"The walk home takes {rng.randint(12, 90)} minutes.",
            f"{pick_tailed(rng, NAMES)} lives at number {rng.randint(11, 300)}.",
        )
    )
    sentences.insert(rng.randrange(1, len(sentences)), said)


def draw(rng: random.Random) -> Question:
    who, thing = pick_tailed(rng, NAMES), pick_tailed(rng, THINGS)
    count = rng.randint(24, 260)
    sentences = [
        rng.choice(
            (
                f"{who} has {count} {thing}.",
                f"There are {count} {thing} on the table of {who}.",
                f"{who} starts the week with {count} {thing}.",
            )
        )
    ]
    equations: list[str] = []
    wanted = rng.randint(2, 4)
    while len(equations) < wanted:
        made = rng.choice(STEPS)(rng, count, who)
        if made is None or made[2] > LARGEST or len(equations) + len(made[1]) > wanted:
            continue
        sentences.append(made[0])
        equations += made[1]
        count = made[2]
    if happens(rng, 0.4):
        add_distraction(rng, sentences, who)
    ending = rng.choice(
        (
            f"How many {thing} does {who} have now?",
            f"How many {thing} are there in the end?",
        )
    )
    return " ".join([*sentences, ending]), f"{'; '.join(equations)}; {count}"
