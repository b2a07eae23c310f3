"""Requests answered by tool calls written in 64 tokens that the backbone does not have."""

import random
from collections.abc import Callable

from benchmarks.quality.drawing import (
    CITIES,
    MONTHS,
    NAMES,
    Question,
    happens,
    ordinal,
    pick_tailed,
    spell,
)

CALL, END, THEN, ARG = "<call>", "</call>", "<then>", "<arg>"
TOOLS = [
    "weather",
    "alarm",
    "timer",
    "message",
    "email",
    "calendar",
    "music",
    "light",
    "heating",
    "taxi",
    "train",
    "flight",
    "hotel",
    "table",
    "payment",
    "reminder",
    "note",
    "translate",
    "search",
    "news",
    "stock",
    "route",
    "camera",
    "door",
]
PARAMETERS = [
    "city",
    "day",
    "time",
    "minutes",
    "person",
    "text",
    "amount",
    "room",
    "level",
    "title",
    "from",
    "to",
    "guests",
    "nights",
    "language",
    "topic",
    "company",
    "date",
]
N_NEW_TOKENS = 64
DESTINATIONS = CITIES[:20]
ROOMS = ["kitchen", "bedroom", "hall", "garage", "attic", "cellar", "study", "bathroom"]
SONGS = [
    "Blue Harbour",
    "Seven Rivers",
    "The Long Way",
    "Paper Moon",
    "Old Maple",
    "Night Ferry",
    "Silver Rain",
    "Red Barn",
]
TEXTS = [
    "I will be late",
    "call me back",
    "the key is under the stone",
    "dinner is ready",
    "bring the map",
    "the train is full",
    "see you at the harbour",
    "the parcel has arrived",
]
LANGUAGES = ["German", "French", "Italian", "Spanish", "Dutch", "Polish", "Danish", "Finnish"]
TOPICS = ["football", "elections", "rockets", "farming", "museums", "chess", "robots", "oceans"]
COMPANIES = [
    "Nordwind",
    "Halvex",
    "Brightmill",
    "Orrin",
    "Castera",
    "Velmont",
    "Tarkas",
    "Plumworth",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
Arguments = dict[str, str]
Request = tuple[str, str, Arguments]
"""What is said, the tool and its arguments in order."""


def new_tokens() -> list[str]:
    """The tokens to add, in order; the last few are kept in reserve, as real tokenizers do."""
    used = [CALL, END, THEN, ARG]
    used += [f"<tool:{name}>" for name in TOOLS] + [f"<{name}>" for name in PARAMETERS]
    return used + [f"<reserved:{i}>" for i in range(N_NEW_TOKENS - len(used))]


def clock(rng: random.Random) -> tuple[str, str]:
    """A time as people say it and as 24 hours."""
    hour, minute = rng.randint(1, 12), rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50))
    is_evening = happens(rng, 0.5)
    hour_24 = hour % 12 + 12 * is_evening
    following = hour % 12 + 1
    part = "pm" if is_evening else "am"
    # The part of the day is that of the time meant, also for "to".
    if minute == 30 and happens(rng, 0.5):  # noqa: PLR2004 - half an hour
        said = f"half past {spell(hour)} {part}"
    elif minute == 45 and hour != 11:  # noqa: PLR2004 - a quarter to twelve would change the half
        said = f"a quarter to {spell(following)} {part}"
    else:
        said = f"{hour}:{minute:02d} {part}"
    return said, f"{hour_24:02d}:{minute:02d}"


def lasting(rng: random.Random) -> tuple[str, str]:
    hours, minutes = rng.randint(0, 5), rng.randrange(5, 60, 5)
    if hours == 0:
        return f"{spell(minutes)} minutes", str(minutes)
    unit = "hour" if hours == 1 else "hours"
    return f"{spell(hours)} {unit} and {spell(minutes)} minutes", str(60 * hours + minutes)


def date(rng: random.Random) -> tuple[str, str]:
    month, day = rng.randrange(12), rng.randint(1, 28)
    return f"{MONTHS[month]} {ordinal(day)}", f"{month + 1:02d}-{day:02d}"


def weather(rng: random.Random) -> Request:
    city, day = pick_tailed(rng, DESTINATIONS), rng.choice(DAYS)
    said = rng.choice((f"tell me if it rains in {city} on {day}", f"check {day}'s sky over {city}"))
    return said, "weather", {"city": city, "day": day}


def alarm(rng: random.Random) -> Request:
    said, time = clock(rng)
    ask = rng.choice((f"wake me at {said}", f"set the alarm for {said}"))
    return ask, "alarm", {"time": time}


def timer(rng: random.Random) -> Request:
    said, minutes = lasting(rng)
    ask = rng.choice((f"count down {said}", f"start a timer of {said}"))
    return ask, "timer", {"minutes": minutes}


def message(rng: random.Random) -> Request:
    person, text = pick_tailed(rng, NAMES), rng.choice(TEXTS)
    said = rng.choice((f"tell {person} that {text}", f"text '{text}' to {person}"))
    return said, "message", {"person": person, "text": text}


def calendar(rng: random.Random) -> Request:
    person = pick_tailed(rng, NAMES)
    (day, date_), (said, time) = date(rng), clock(rng)
    ask = rng.choice((f"plan a meeting with {person} on {day} at {said}",))
    return ask, "calendar", {"person": person, "date": date_, "time": time}


def music(rng: random.Random) -> Request:
    song, room = rng.choice(SONGS), rng.choice(ROOMS)
    return f"play {song} in the {room}", "music", {"title": song, "room": room}


def light(rng: random.Random) -> Request:
    room, level = rng.choice(ROOMS), rng.randint(2, 99)
    ask = rng.choice(
        (f"dim the {room} to {spell(level)} percent", f"light the {room} at {spell(level)} percent")
    )
    return ask, "light", {"room": room, "level": str(level)}


def heating(rng: random.Random) -> Request:
    room, level = rng.choice(ROOMS), rng.randint(15, 27)
    said, time = clock(rng)
    return (
        f"heat the {room} to {spell(level)} degrees from {said}",
        "heating",
        {"room": room, "level": str(level), "time": time},
    )


def train(rng: random.Random) -> Request:
    here, there = rng.sample(DESTINATIONS, 2)
    day, date_ = date(rng)
    tool = rng.choice(("train", "flight"))
    verb = "fly" if tool == "flight" else "go by rail"
    ask = rng.choice(
        (f"on {day} I {verb} from {here} to {there}", f"I {verb} to {there} from {here} on {day}")
    )
    return ask, tool, {"from": here, "to": there, "date": date_}


def hotel(rng: random.Random) -> Request:
    city, nights, guests = pick_tailed(rng, DESTINATIONS), rng.randint(2, 14), rng.randint(2, 9)
    return (
        f"find {spell(nights)} nights in {city} for {spell(guests)} people",
        "hotel",
        {"city": city, "nights": str(nights), "guests": str(guests)},
    )


def table(rng: random.Random) -> Request:
    guests, day = rng.randint(2, 14), rng.choice(DAYS)
    said, time = clock(rng)
    return (
        f"we are {spell(guests)} for dinner on {day} at {said}",
        "table",
        {"day": day, "time": time, "guests": str(guests)},
    )


def payment(rng: random.Random) -> Request:
    person, amount = pick_tailed(rng, NAMES), rng.randint(3, 990)
    ask = rng.choice(
        (f"send {person} {spell(amount)} euros", f"pay {spell(amount)} euros to {person}")
    )
    return ask, "payment", {"amount": str(amount), "person": person}


def translate(rng: random.Random) -> Request:
    text, language = rng.choice(TEXTS), rng.choice(LANGUAGES)
    return f"say '{text}' in {language}", "translate", {"language": language, "text": text}


def news(rng: random.Random) -> Request:
    topic, day = rng.choice(TOPICS), rng.choice(DAYS)
    return f"read me what {day} brought on {topic}", "news", {"topic": topic, "day": day}


def stock(rng: random.Random) -> Request:
    company = rng.choice(COMPANIES)
    day, date_ = date(rng)
    return f"look up what {company} cost on {day}", "stock", {"company": company, "date": date_}


REQUESTS: tuple[Callable[[random.Random], Request], ...] = (
    weather,
    alarm,
    timer,
    message,
    calendar,
    music,
    light,
    heating,
    train,
    hotel,
    table,
    payment,
    translate,
    news,
    stock,
)


def write_call(tool: str, arguments: Arguments) -> str:
    return f"<tool:{tool}>" + "".join(f"<{name}>{value}" for name, value in arguments.items())


def draw(rng: random.Random) -> Question:
    first, second = (make(rng) for make in rng.sample(REQUESTS, 2))
    calls = [write_call(first[1], first[2])]
    said = first[0]
    if happens(rng, 0.6):
        calls.append(write_call(second[1], second[2]))
        if happens(rng, 0.4):
            # Said last, done first.
            calls.reverse()
            said = f"{said}, but before that {second[0]}"
        else:
            said = f"{said}{rng.choice((' and then ', ', after that ', '; next, '))}{second[0]}"
    opening = rng.choice(("Please ", "", "Could you: ", "Hey, "))
    question = f"{opening}{said}."
    return question[0].upper() + question[1:], CALL + THEN.join(calls) + END
