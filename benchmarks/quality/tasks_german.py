"""English sentences with dates, times, prices and cases, and their German."""

import random

from benchmarks.quality.drawing import MONTHS, NAMES, Question, happens, pick_tailed, spell

# English, German, gender.
NOUNS = (
    ("dog", "Hund", "m"),
    ("cat", "Katze", "f"),
    ("house", "Haus", "n"),
    ("table", "Tisch", "m"),
    ("lamp", "Lampe", "f"),
    ("book", "Buch", "n"),
    ("coat", "Mantel", "m"),
    ("bag", "Tasche", "f"),
    ("picture", "Bild", "n"),
    ("car", "Auto", "n"),
    ("key", "Schlüssel", "m"),
    ("flower", "Blume", "f"),
    ("chair", "Stuhl", "m"),
    ("clock", "Uhr", "f"),
    ("knife", "Messer", "n"),
    ("letter", "Brief", "m"),
    ("bottle", "Flasche", "f"),
    ("boat", "Boot", "n"),
    ("carpet", "Teppich", "m"),
    ("newspaper", "Zeitung", "f"),
    ("bed", "Bett", "n"),
    ("garden", "Garten", "m"),
    ("map", "Karte", "f"),
    ("glass", "Glas", "n"),
    ("basket", "Korb", "m"),
    ("bridge", "Brücke", "f"),
    ("horse", "Pferd", "n"),
    ("ring", "Ring", "m"),
    ("door", "Tür", "f"),
    ("bicycle", "Fahrrad", "n"),
)
PEOPLE = (
    ("neighbour", "Nachbar", "m"),
    ("teacher", "Lehrerin", "f"),
    ("child", "Kind", "n"),
    ("baker", "Bäcker", "m"),
    ("aunt", "Tante", "f"),
    ("girl", "Mädchen", "n"),
    ("doctor", "Arzt", "m"),
    ("sister", "Schwester", "f"),
    ("uncle", "Onkel", "m"),
    ("friend", "Freundin", "f"),
)
ADJECTIVES = (
    ("old", "alt"),
    ("new", "neu"),
    ("small", "klein"),
    ("red", "rot"),
    ("beautiful", "schön"),
    ("green", "grün"),
    ("cheap", "billig"),
    ("heavy", "schwer"),
    ("black", "schwarz"),
    ("white", "weiß"),
    ("round", "rund"),
    ("broken", "kaputt"),
)
# English and German, third person singular present.
VERBS = (
    ("buys", "kauft"),
    ("sells", "verkauft"),
    ("sees", "sieht"),
    ("looks for", "sucht"),
    ("finds", "findet"),
    ("paints", "malt"),
    ("orders", "bestellt"),
    ("repairs", "repariert"),
    ("carries", "trägt"),
    ("forgets", "vergisst"),
    ("shows", "zeigt"),
    ("needs", "braucht"),
)
MONTHS_DE = [
    "Januar",
    "Februar",
    "März",
    "April",
    "Mai",
    "Juni",
    "Juli",
    "August",
    "September",
    "Oktober",
    "November",
    "Dezember",
]
DAYS = (
    ("Monday", "Montag"),
    ("Tuesday", "Dienstag"),
    ("Wednesday", "Mittwoch"),
    ("Thursday", "Donnerstag"),
    ("Friday", "Freitag"),
    ("Saturday", "Samstag"),
    ("Sunday", "Sonntag"),
)
UNITS_DE = [
    "null",
    "ein",
    "zwei",
    "drei",
    "vier",
    "fünf",
    "sechs",
    "sieben",
    "acht",
    "neun",
    "zehn",
    "elf",
    "zwölf",
    "dreizehn",
    "vierzehn",
    "fünfzehn",
    "sechzehn",
    "siebzehn",
    "achtzehn",
    "neunzehn",
]
TENS_DE = [
    "_",
    "zehn",
    "zwanzig",
    "dreißig",
    "vierzig",
    "fünfzig",
    "sechzig",
    "siebzig",
    "achtzig",
    "neunzig",
]
DEFINITE = {
    "nom": {"m": "der", "f": "die", "n": "das"},
    "acc": {"m": "den", "f": "die", "n": "das"},
    "dat": {"m": "dem", "f": "der", "n": "dem"},
}
INDEFINITE = {
    "nom": {"m": "ein", "f": "eine", "n": "ein"},
    "acc": {"m": "einen", "f": "eine", "n": "ein"},
    "dat": {"m": "einem", "f": "einer", "n": "einem"},
}
WEAK = {
    "nom": {"m": "e", "f": "e", "n": "e"},
    "acc": {"m": "en", "f": "e", "n": "e"},
    "dat": {"m": "en", "f": "en", "n": "en"},
}
MIXED = {
    "nom": {"m": "er", "f": "e", "n": "es"},
    "acc": {"m": "en", "f": "e", "n": "es"},
    "dat": {"m": "en", "f": "en", "n": "en"},
}
Noun = tuple[str, str, str]


def spell_german(number: int) -> str:
    """Write 1 to 999 in German words."""
    hundreds, rest = divmod(number, 100)
    if hundreds:
        return f"{UNITS_DE[hundreds]}hundert{spell_german(rest) if rest else ''}"
    if rest < len(UNITS_DE):
        return "eins" if rest == 1 else UNITS_DE[rest]
    tens, unit = divmod(rest, 10)
    return f"{UNITS_DE[unit]}und{TENS_DE[tens]}" if unit else TENS_DE[tens]


def noun_phrase(rng: random.Random, noun: Noun, case: str) -> tuple[str, str]:
    english, german, gender = noun
    is_definite = happens(rng, 0.5)
    articles, endings = (DEFINITE, WEAK) if is_definite else (INDEFINITE, MIXED)
    words, worte = [english], [german]
    if happens(rng, 0.55):
        adjective, adjektiv = pick_tailed(rng, ADJECTIVES)
        words.insert(0, adjective)
        worte.insert(0, adjektiv + endings[case][gender])
    article = "an" if words[0][0] in "aeiou" else "a"
    return (
        " ".join(["the" if is_definite else article, *words]),
        " ".join([articles[case][gender], *worte]),
    )


def subject(rng: random.Random) -> tuple[str, str]:
    if happens(rng, 0.4):
        name = pick_tailed(rng, NAMES)
        return name, name
    return noun_phrase(rng, pick_tailed(rng, PEOPLE), "nom")


def when(rng: random.Random) -> tuple[str, str]:
    """A date, a day or a time of the clock."""
    kind = rng.randrange(3)
    if kind == 0:
        day, month = rng.randint(1, 28), rng.randrange(12)
        return f"on {MONTHS[month]} {day}", f"am {day}. {MONTHS_DE[month]}"
    if kind == 1:
        day_en, day_de = rng.choice(DAYS)
        part_en, part_de = rng.choice(
            (("morning", "morgen"), ("evening", "abend"), ("afternoon", "nachmittag"))
        )
        return f"on {day_en} {part_en}", f"am {day_de}{part_de}"
    return clock_time(rng)


def clock_time(rng: random.Random) -> tuple[str, str]:
    """Quarters and halves have words of their own; a German half names the hour to come."""
    hour = rng.randint(1, 11)
    english, german = (tuple(write(n) for n in (hour, hour + 1)) for write in (spell, spell_german))
    marks = (
        (f"a quarter past {english[0]}", f"Viertel nach {german[0]}"),
        (f"half past {english[0]}", f"halb {german[1]}"),
        (f"a quarter to {english[1]}", f"Viertel vor {german[1]}"),
    )
    if happens(rng, 0.4):
        said, gesagt = rng.choice(marks)
        return f"at {said}", f"um {gesagt}"
    minutes = rng.choice((5, 10, 20))
    if happens(rng, 0.5):
        return (
            f"at {spell(minutes)} past {english[0]}",
            f"um {spell_german(minutes)} nach {german[0]}",
        )
    return f"at {spell(minutes)} to {english[1]}", f"um {spell_german(minutes)} vor {german[1]}"


def price(rng: random.Random) -> tuple[str, str]:
    # No 101, 201, 301: German is of two minds about their ending.
    euros = rng.choice([n for n in range(2, 400) if n % 100 != 1])
    if happens(rng, 0.5):
        return f"for {spell(euros)} euros", f"für {spell_german(euros)} Euro"
    cents = rng.randint(2, 19) * 5
    return f"for {euros}.{cents:02d} euros", f"für {euros},{cents:02d} Euro"


def draw(rng: random.Random) -> Question:
    who, wer = subject(rng)
    verb, verbum = pick_tailed(rng, VERBS)
    what, was = noun_phrase(rng, pick_tailed(rng, NOUNS), "acc")
    words, worte = [who, verb, what], [wer, verbum, was]
    if happens(rng, 0.35):
        whom, wem = noun_phrase(rng, pick_tailed(rng, PEOPLE), "dat")
        words.append(f"with {whom}")
        worte.append(f"mit {wem}")
    if happens(rng, 0.4):
        paid, bezahlt = price(rng)
        words.append(paid)
        worte.append(bezahlt)
    if happens(rng, 0.7):
        time, zeit = when(rng)
        if happens(rng, 0.5):
            # German keeps the verb second, so the subject moves behind it.
            words = [time[0].upper() + time[1:] + ",", *words]
            worte = [zeit, verbum, wer, *worte[2:]]
        else:
            words.append(time)
            worte.append(zeit)
    english, german = " ".join(words), " ".join(worte)
    ask = rng.choice(("Translate into German:", "In German:", "Say this in German:"))
    return (
        f"{ask} {english[0].upper()}{english[1:]}.",
        f"{german[0].upper()}{german[1:]}.",
    )
