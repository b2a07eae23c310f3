"""What the tasks share: words drawn with a tail, so that some are seen rarely in training."""

import random
from collections.abc import Sequence
from typing import TypeVar

SEED = 20261123
T = TypeVar("T")
Question = tuple[str, str]

NAMES = [
    "Mia",
    "Tom",
    "Anna",
    "Leo",
    "Sara",
    "Omar",
    "Lena",
    "Ivan",
    "Nora",
    "Hugo",
    "Emma",
    "Yusuf",
    "Clara",
    "Felix",
    "Ruth",
    "Pablo",
    "Ines",
    "Oscar",
    "Greta",
    "Samir",
    "Alma",
    "Jonas",
    "Tara",
    "Viktor",
    "Elsa",
    "Marco",
    "Dina",
    "Peter",
    "Zoe",
    "Karim",
    "Bela",
    "Rosa",
    "Anton",
    "Wanda",
    "Idris",
    "Paula",
    "Simon",
    "Yara",
    "Bruno",
    "Heidi",
]
UNITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ORDINALS = [
    "zeroth",
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]

CITIES = [
    "Oslo",
    "Paris",
    "Tokyo",
    "Rome",
    "Madrid",
    "Cairo",
    "Nairobi",
    "Lima",
    "Havana",
    "Athens",
    "Warsaw",
    "Vienna",
    "Dublin",
    "Lisbon",
    "Helsinki",
    "Budapest",
    "Milan",
    "Lyon",
    "Kyoto",
    "Bergen",
    "Porto",
    "Krakow",
]


def pick_tailed(rng: random.Random, words: Sequence[T]) -> T:
    """Choose one word; the i-th is drawn in proportion to 1 / (i + 4), a flattened Zipf law."""
    return rng.choices(words, weights=[1 / (i + 4) for i in range(len(words))])[0]


def happens(rng: random.Random, probability: float) -> bool:
    return rng.random() < probability


def spell(number: int) -> str:
    """Write 0 to 999 in English words."""
    hundreds, rest = divmod(number, 100)
    if hundreds:
        tail = f" and {spell(rest)}" if rest else ""
        return f"{UNITS[hundreds]} hundred{tail}"
    if number < len(UNITS):
        return UNITS[number]
    tens, unit = divmod(number, 10)
    return f"{TENS[tens]}-{UNITS[unit]}" if unit else TENS[tens]


def ordinal(number: int) -> str:
    """Write a day of the month: 1st, 22nd, 13th."""
    is_teen = number % 100 // 10 == 1
    suffix = "th" if is_teen else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"
