"""Records rewritten from one notation to another, sorted, filtered or renamed as told."""

import json
import random
from collections.abc import Callable

from benchmarks.quality.drawing import CITIES, NAMES, Question, happens, pick_tailed

JOBS = [
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
FIELDS: dict[str, Callable[[random.Random], str | int]] = {
    "name": lambda rng: pick_tailed(rng, NAMES),
    "age": lambda rng: rng.randint(18, 80),
    "city": lambda rng: pick_tailed(rng, CITIES),
    "job": lambda rng: pick_tailed(rng, JOBS),
    "pay": lambda rng: rng.randint(120, 990),
    "room": lambda rng: rng.randint(1, 60),
}
NUMERIC = ("age", "pay", "room")
NEW_NAMES = ("id", "key", "label", "title", "place", "kind", "level", "code", "site", "rank")
LONGEST_ANSWER = 104
Record = dict[str, str | int]


def as_json(records: list[Record]) -> str:
    return json.dumps(records)


def as_csv(records: list[Record]) -> str:
    lines = [",".join(records[0]), *(",".join(map(str, record.values())) for record in records)]
    return " / ".join(lines)


def as_markdown(records: list[Record]) -> str:
    rows = [list(records[0]), *(list(map(str, record.values())) for record in records)]
    return " ".join("| " + " | ".join(row) + " |" for row in rows)


def as_yaml(records: list[Record]) -> str:
    return " ".join(
        "- " + ", ".join(f"{field}: {value}" for field, value in record.items())
        for record in records
    )


NOTATIONS: dict[str, Callable[[list[Record]], str]] = {
    "JSON": as_json,
    "CSV": as_csv,
    "Markdown": as_markdown,
    "YAML": as_yaml,
}


def sort_records(rng: random.Random, records: list[Record]) -> tuple[str, list[Record]]:
    field = rng.choice([name for name in records[0] if name in NUMERIC or name == "name"])
    falls = happens(rng, 0.5)
    order = "descending" if falls else "ascending"
    return f"sorted by {field}, {order}", sorted(records, key=lambda r: r[field], reverse=falls)


def filter_records(rng: random.Random, records: list[Record]) -> tuple[str, list[Record]]:
    fields = [name for name in records[0] if name in NUMERIC]
    if not fields:
        return sort_records(rng, records)
    field = rng.choice(fields)
    limit = int(rng.choice(records)[field]) + rng.choice((-1, 1))
    if happens(rng, 0.5):
        return f"only where {field} > {limit}", [r for r in records if int(r[field]) > limit]
    return f"only where {field} < {limit}", [r for r in records if int(r[field]) < limit]


def rename_field(rng: random.Random, records: list[Record]) -> tuple[str, list[Record]]:
    old, new = rng.choice(list(records[0])), rng.choice(NEW_NAMES)
    renamed = [{new if k == old else k: v for k, v in record.items()} for record in records]
    return f"with {old} renamed to {new}", renamed


def drop_field(rng: random.Random, records: list[Record]) -> tuple[str, list[Record]]:
    gone = rng.choice(list(records[0]))
    return f"without {gone}", [{k: v for k, v in r.items() if k != gone} for r in records]


def raise_case(rng: random.Random, records: list[Record]) -> tuple[str, list[Record]]:
    fields = [name for name, value in records[0].items() if isinstance(value, str)]
    if not fields:
        return drop_field(rng, records)
    field = rng.choice(fields)
    return f"with {field} in capitals", [{**r, field: str(r[field]).upper()} for r in records]


FIRST = (sort_records, filter_records)
SECOND = (rename_field, drop_field, raise_case)


def draw(rng: random.Random) -> Question:
    while True:
        fields = rng.sample(list(FIELDS), 3)
        if not {"name", *NUMERIC} & set(fields):
            continue
        records = [{f: FIELDS[f](rng) for f in fields} for _ in range(rng.randint(2, 4))]
        if any(len({r[f] for r in records}) < len(records) for f in fields):
            continue
        source, target = rng.sample(list(NOTATIONS), 2)
        told, changed = rng.choice(FIRST)(rng, records)
        if not changed:
            continue
        if happens(rng, 0.6):
            more, changed = rng.choice(SECOND)(rng, changed)
            told = f"{told} and {more}"
        answer = NOTATIONS[target](changed)
        if len(answer) <= LONGEST_ANSWER:
            ask = rng.choice(("Rewrite as", "Convert to", "Give me in", "Turn into"))
            return f"{ask} {target}, {told}: {NOTATIONS[source](records)}", answer
