"""A sentence about a list, a text or a number; the answer is one line of Python."""

import random

from benchmarks.quality.drawing import ORDINALS, Question, happens, pick_tailed, spell

VERBS = [
    "get",
    "find",
    "build",
    "make",
    "collect",
    "compute",
    "pick",
    "take",
    "read",
    "load",
    "scan",
    "derive",
    "fetch",
    "list",
]
NOUNS = [
    "prices",
    "words",
    "totals",
    "scores",
    "items",
    "names",
    "lengths",
    "values",
    "marks",
    "rates",
    "sizes",
    "weights",
    "labels",
    "rows",
    "codes",
    "tags",
    "votes",
    "points",
    "shares",
    "depths",
    "tokens",
    "ages",
    "turns",
    "gaps",
    "limits",
]
SHORT = ("xs", "items", "data", "values", "seq", "rows", "nums", "arr", "vec", "batch")
NUMBER_TESTS = (
    ("greater than {n}", "{x} > {k}"),
    ("less than {n}", "{x} < {k}"),
    ("at least {n}", "{x} >= {k}"),
    ("at most {n}", "{x} <= {k}"),
    ("divisible by {n}", "{x} % {k} == 0"),
    ("different from {n}", "{x} != {k}"),
    ("even", "{x} % 2 == 0"),
    ("odd", "{x} % 2 == 1"),
    ("negative", "{x} < 0"),
)
NUMBER_MAPS = (
    ("the squares of", "{x} ** 2"),
    ("the cubes of", "{x} ** 3"),
    ("the absolute values of", "abs({x})"),
    ("{n} times", "{k} * {x}"),
    ("the remainders modulo {n} of", "{x} % {k}"),
    ("the negatives of", "-{x}"),
    ("the halves, rounded down, of", "{x} // 2"),
    ("the numbers of decimal digits of", "len(str(abs({x})))"),
)
TEXT_TESTS = (
    ("longer than {n} characters", "len({x}) > {k}"),
    ("shorter than {n} characters", "len({x}) < {k}"),
    ("that start with '{c}'", "{x}.startswith('{c}')"),
    ("that end in '{c}'", "{x}.endswith('{c}')"),
    ("that contain '{c}'", "'{c}' in {x}"),
    ("made of digits only", "{x}.isdigit()"),
    ("in capital letters", "{x}.isupper()"),
)
TEXT_MAPS = (
    ("the lengths of", "len({x})"),
    ("the upper-case forms of", "{x}.upper()"),
    ("the stripped forms of", "{x}.strip()"),
    ("the reversed forms of", "{x}[::-1]"),
    ("the {o} characters of", "{x}[{i}]"),
    ("the last {n} characters of", "{x}[-{k}:]"),
    ("the numbers of '{c}' in", "{x}.count('{c}')"),
)
NUMBER_FOLDS = (
    ("the sum of", "sum({g})"),
    ("the largest of", "max({g}, default=None)"),
    ("the smallest of", "min({g}, default=None)"),
    ("a sorted list of", "sorted({g})"),
    ("a list, in falling order, of", "sorted({g}, reverse=True)"),
    ("a set of", "set({g})"),
    ("a tuple of", "tuple({g})"),
    ("the product of", "math.prod({g})"),
)
TEXT_FOLDS = (
    ("a sorted list of", "sorted({g})"),
    ("a set of", "set({g})"),
    ("the first of", "next({g}, None)"),
    ("a list of", "list({g})"),
    ("a tally of", "Counter({g})"),
)
SLICES = (
    ("without the first {n}", "[{k}:]"),
    ("without the last {n}", "[:-{k}]"),
    ("every {o} one only", "[::{i1}]"),
    ("the first {n} only", "[:{k}]"),
    ("the last {n} only", "[-{k}:]"),
    ("from the {o} one on", "[{i}:]"),
)


def fill(rng: random.Random, pair: tuple[str, str], x: str) -> tuple[str, str]:
    """Give a phrase and its code the same number, ordinal and letters."""
    k, at = rng.randint(2, 120), rng.randint(2, 9)
    letters = "".join(rng.sample("abcdefghiklmnoprstuw", rng.randint(1, 3)))
    words, code = pair
    said = words.format(n=spell(k), o=ORDINALS[at], c=letters)
    return said, code.format(x=x, k=k, i=at - 1, i1=at, c=letters, g="{g}")


def draw(rng: random.Random) -> Question:
    on_text = happens(rng, 0.45)
    tests, maps, folds = (
        (TEXT_TESTS, TEXT_MAPS, TEXT_FOLDS)
        if on_text
        else (NUMBER_TESTS, NUMBER_MAPS, NUMBER_FOLDS)
    )
    verb, first, second = rng.choice(VERBS), pick_tailed(rng, NOUNS), pick_tailed(rng, NOUNS)
    argument = rng.choice(SHORT)
    x = argument[0]
    test_words, test = fill(rng, rng.choice(tests), x)
    map_words, mapped = fill(rng, rng.choice(maps), x)
    fold_words, fold = fill(rng, rng.choice(folds), x)
    if happens(rng, 0.35):
        joint = rng.choice(("and", "or"))
        more_words, more = fill(rng, rng.choice(tests), x)
        test_words, test = f"{test_words} {joint} {more_words}", f"{test} {joint} {more}"
    source, cut = argument, ""
    if happens(rng, 0.5):
        cut_words, sliced = fill(rng, rng.choice(SLICES), x)
        source, cut = argument + sliced, f" ({cut_words})"
    kind = "texts" if on_text else "numbers"
    tested = f"{kind} {test_words}" if on_text else f"{kind} that are {test_words}"
    question = rng.choice(
        (
            "Write a Python function {v} {a} {b} of {p} that returns {f} {m} the {t} in {p}{c}.",
            "Python, {v} {a} {b} of {p}. Docstring: Return {f} {m} the {t} in {p}{c}.",
            "I need {f} {m} the {t} in {p}{c}. The Python function is to be named {v} {a} {b}.",
        )
    ).format(v=verb, a=first, b=second, p=argument, f=fold_words, m=map_words, t=tested, c=cut)
    inner = fold.format(g=f"{mapped} for {x} in {source} if {test}")
    if fold.startswith("next("):
        inner = f"next(({mapped} for {x} in {source} if {test}), None)"
    elif "{g}," in fold:
        inner = fold.format(g=f"({mapped} for {x} in {source} if {test})")
    return question, f"def {verb}_{first}_{second}({argument}): return {inner}"
