"""English rewritten in a made-up dialect with words, endings and a word order of its own."""

import random
from functools import cache

from benchmarks.quality.drawing import NAMES, SEED, Question, happens, pick_tailed, spell

NOUNS = [
    "dog",
    "cat",
    "house",
    "table",
    "lamp",
    "book",
    "coat",
    "bag",
    "picture",
    "car",
    "key",
    "flower",
    "chair",
    "clock",
    "knife",
    "letter",
    "bottle",
    "boat",
    "carpet",
    "bed",
    "garden",
    "map",
    "glass",
    "basket",
    "bridge",
    "horse",
    "ring",
    "door",
    "river",
    "mountain",
    "tree",
    "bird",
    "fish",
    "stone",
    "road",
    "field",
    "tower",
    "wall",
    "window",
    "candle",
    "mirror",
    "needle",
    "rope",
    "hammer",
    "bell",
    "wheel",
    "cloud",
    "island",
    "forest",
    "harbour",
    "market",
    "school",
    "ladder",
    "pillow",
    "ribbon",
    "saddle",
]
ADJECTIVES = [
    "old",
    "new",
    "small",
    "red",
    "green",
    "cheap",
    "heavy",
    "black",
    "white",
    "round",
    "broken",
    "tall",
    "quiet",
    "bright",
    "warm",
    "cold",
    "narrow",
    "wide",
    "soft",
    "sharp",
]
# Stem, third person, past.
VERBS = (
    ("buy", "buys", "bought"),
    ("sell", "sells", "sold"),
    ("see", "sees", "saw"),
    ("find", "finds", "found"),
    ("paint", "paints", "painted"),
    ("carry", "carries", "carried"),
    ("forget", "forgets", "forgot"),
    ("hide", "hides", "hid"),
    ("break", "breaks", "broke"),
    ("draw", "draws", "drew"),
    ("clean", "cleans", "cleaned"),
    ("lose", "loses", "lost"),
    ("steal", "steals", "stole"),
    ("bring", "brings", "brought"),
    ("build", "builds", "built"),
    ("move", "moves", "moved"),
)
PLACES = (("near", "ke"), ("under", "vo"), ("behind", "ruf"), ("above", "tam"), ("inside", "lis"))
PLURALS = {"knife": "knives", "fish": "fish", "glass": "glasses"}
STARTS = [
    "b",
    "d",
    "f",
    "g",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "z",
    "br",
    "dr",
    "kl",
    "pl",
    "st",
    "tr",
]
VOWELS = ["a", "e", "i", "o", "u", "ai", "ou"]


@cache
def lexicon() -> dict[str, str]:
    """One made-up word for each English stem, all different."""
    rng = random.Random(SEED)
    stems = [*NOUNS, *ADJECTIVES, *(verb[0] for verb in VERBS)]
    words: dict[str, None] = {}
    while len(words) < len(stems):
        syllables = (rng.choice(STARTS) + rng.choice(VOWELS) for _ in range(2))
        words["".join(syllables) + rng.choice(("", "n", "l", "k"))] = None
    return dict(zip(stems, words, strict=True))


def plural(noun: str) -> str:
    return PLURALS.get(noun, f"{noun}s")


def noun_phrase(rng: random.Random) -> tuple[str, str]:
    """Adjective and number follow the noun; a plural doubles the first two letters."""
    noun = pick_tailed(rng, NOUNS)
    native = lexicon()[noun]
    adjectives = [pick_tailed(rng, ADJECTIVES)] if happens(rng, 0.5) else []
    natives = [lexicon()[adjective] for adjective in adjectives]
    if happens(rng, 0.35):
        count = rng.randint(2, 99)
        # Numbers are said backwards, digit by digit.
        backwards = "-".join(reversed(str(count)))
        return (
            " ".join([spell(count), *adjectives, plural(noun)]),
            " ".join([native[:2] + native, *natives, backwards]),
        )
    if happens(rng, 0.5):
        return " ".join(["the", *adjectives, noun]), " ".join([native, *natives, "lo"])
    head = [*adjectives, noun]
    article = "an" if head[0][0] in "aeiou" else "a"
    return " ".join([article, *head]), " ".join([native, *natives])


def draw(rng: random.Random) -> Question:
    """The dialect puts object first, then place, then subject; the verb ends the sentence."""
    who = pick_tailed(rng, NAMES)
    stem, present, past = pick_tailed(rng, VERBS)
    native = lexicon()[stem]
    tense = rng.randrange(4)
    english, dialect = (
        (present, native),
        (past, f"{native}ta"),
        (f"will {stem}", f"{native}mi"),
        (f"does not {stem}", f"ni{native}"),
    )[tense]
    what, native_what = noun_phrase(rng)
    words, natives = [who, english, what], [native_what]
    if happens(rng, 0.6):
        place, native_place = rng.choice(PLACES)
        where, native_where = noun_phrase(rng)
        words += [place, where]
        natives.append(f"{native_where} {native_place}")
    if happens(rng, 0.3):
        other = pick_tailed(rng, NAMES)
        words += ["for", other]
        natives.append(f"{other}-su")
    natives += [f"{who}-an", dialect]
    sentence = " ".join(words)
    return f"Say in the island dialect: {sentence}.", f"{' '.join(natives)}."
