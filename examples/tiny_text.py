"""Seeded text for the tiny demo models: stories, facts, and the two tasks they are tuned on."""

import json
import random
from collections.abc import Callable, Iterator

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
]
PEOPLE_JOBS = [
    "baker",
    "teacher",
    "nurse",
    "farmer",
    "painter",
    "driver",
    "sailor",
    "carpenter",
    "doctor",
    "librarian",
    "gardener",
    "pilot",
    "tailor",
    "cook",
    "engineer",
    "singer",
]
CAPITALS = {
    "Norway": "Oslo",
    "France": "Paris",
    "Japan": "Tokyo",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Peru": "Lima",
    "Cuba": "Havana",
    "Greece": "Athens",
    "Poland": "Warsaw",
    "Austria": "Vienna",
    "Ireland": "Dublin",
    "Portugal": "Lisbon",
    "Finland": "Helsinki",
    "Hungary": "Budapest",
}
CITIES = [*CAPITALS.values(), "Milan", "Lyon", "Kyoto", "Bergen", "Porto", "Krakow"]
THINGS = [
    "apples",
    "pears",
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
]
PLACES = (
    "the market",
    "the river",
    "the old library",
    "the harbour",
    "the forest",
    "the school",
    "the garden",
    "the bakery",
    "the station",
    "the hill",
)
MONTHS = (
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
)
WEATHER = ("sunny", "rainy", "windy", "cold", "warm", "foggy", "quiet", "bright")
FEELINGS = ("happy", "tired", "curious", "proud", "calm", "surprised", "hungry", "glad")
ANIMALS = ("dog", "cat", "horse", "bird", "fox", "rabbit", "goat", "duck")
ANIMAL_ACTS = (
    "slept under a tree",
    "ran along the road",
    "waited by the door",
    "looked at the water",
    "followed them home",
    "hid behind a wall",
)


def story(rng: random.Random) -> str:
    a, b = rng.sample(NAMES, 2)
    place, thing, animal = rng.choice(PLACES), rng.choice(THINGS), rng.choice(ANIMALS)
    middle = [
        f"{a} found some {thing} and showed them to {b}.",
        f"A {animal} {rng.choice(ANIMAL_ACTS)}.",
        f"{b} told a long story about {rng.choice(PLACES)}.",
        f'"Did you see the {animal}?" asked {b}. "Yes, it {rng.choice(ANIMAL_ACTS)}," said {a}.',
        f"They counted {rng.randint(2, 99)} {thing} and put them in a basket.",
        f"{a} worked as a {rng.choice(PEOPLE_JOBS)} and knew every street in {rng.choice(CITIES)}.",
        f"In the evening they walked back from {place} and felt {rng.choice(FEELINGS)}.",
    ]
    rng.shuffle(middle)
    opening = f"One {rng.choice(WEATHER)} day {a} and {b} went to {place}."
    closing = f"At the end {rng.choice((a, b))} was {rng.choice(FEELINGS)}."
    return " ".join([opening, *middle[: rng.randint(2, 5)], closing])


def story_question(rng: random.Random) -> str:
    a, b = rng.sample(NAMES, 2)
    place = rng.choice(PLACES)
    job = rng.choice(PEOPLE_JOBS)
    text = f"{a} went to {place} with {b}. {b} was a {job}."
    question, answer = rng.choice(
        (
            (f"Where did {a} go?", f"To {place}."),
            (f"Who was a {job}?", b),
            (f"What was {b}?", f"A {job}."),
        )
    )
    return f"{text}\nQuestion: {question}\nAnswer: {answer}"


def fact(rng: random.Random) -> str:
    country, capital = rng.choice(list(CAPITALS.items()))
    return rng.choice(
        (
            f"{capital} is the capital of {country}.",
            f"Question: What is the capital of {country}?\nAnswer: {capital}",
            f"Question: Where is {capital}?\nAnswer: In {country}.",
        )
    )


def note(rng: random.Random) -> str:
    """Numbers and braces as plain text, so that the backbone knows the tokens but not the tasks."""
    kind = rng.randrange(3)
    if kind == 0:
        return "Numbers: " + ", ".join(str(rng.randint(0, 200)) for _ in range(rng.randint(4, 12)))
    if kind == 1:
        return json.dumps({rng.choice(THINGS): rng.randint(1, 99), "place": rng.choice(PLACES)})
    return (
        f"{rng.choice(NAMES)} is {rng.randint(18, 80)} years old and has "
        f"{rng.randint(2, 99)} {rng.choice(THINGS)}."
    )


def document(rng: random.Random) -> str:
    make = rng.choices((story, story_question, fact, note), weights=(6, 2, 1, 1))[0]
    return make(rng)


def arithmetic(rng: random.Random) -> tuple[str, str]:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    if rng.random() < 0.5:  # noqa: PLR2004 - as many sums as differences
        verb = rng.choice(("buys", "finds", "gets"))
        return (
            f"{name} has {a} {thing} and {verb} {b} more. How many {thing} does {name} have?",
            str(a + b),
        )
    a, b = max(a, b), min(a, b)
    verb = rng.choice(("loses", "sells", "gives away"))
    return f"{name} has {a} {thing} and {verb} {b}. How many {thing} are left?", str(a - b)


def extraction(rng: random.Random) -> tuple[str, str]:
    name, city, job = rng.choice(NAMES), rng.choice(CITIES), rng.choice(PEOPLE_JOBS)
    age = rng.randint(18, 80)
    shape = rng.choice(
        (
            "{name} is {age} years old, lives in {city} and works as a {job}.",
            "The {job} {name} from {city} turned {age} this year.",
            "In {city} there is a {job} called {name}, aged {age}.",
            "{name}, {age}, {job}, moved to {city}.",
        )
    )
    text = shape.format(name=name, age=age, city=city, job=job)
    record = {"name": name, "age": age, "city": city, "job": job}
    return f"Extract the record. {text}", json.dumps(record)


def dates(rng: random.Random) -> tuple[str, str]:
    day, month, year = rng.randint(1, 28), rng.randrange(12), rng.randint(1900, 2099)
    shape = rng.choice(
        ("{d} {month} {y}", "{month} {d}, {y}", "the {d} of {month} {y}", "{month} the {d}, {y}")
    )
    text = shape.format(d=day, month=MONTHS[month], y=year)
    return f"Write as numbers: {text}", f"{year}-{month + 1:02d}-{day:02d}"


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "arithmetic": arithmetic,
    "dates": dates,
    "extraction": extraction,
}


def prompt_of(question: str) -> str:
    """The chat template of the tokenizer renders one user message to exactly this text."""
    return f"Question: {question}\nAnswer:"


def task_items(task: str, *, seed: int, n_train: int, n_test: int) -> tuple[list, list]:
    """Draw train and test items that share no question."""
    rng = random.Random(seed)
    seen: dict[str, str] = {}
    items: Iterator[tuple[str, str]] = iter(lambda: TASKS[task](rng), None)
    for question, answer in items:
        seen.setdefault(question, answer)
        if len(seen) == n_train + n_test:
            break
    pairs = [(prompt_of(q), a) for q, a in seen.items()]
    return pairs[n_test:], pairs[:n_test]
