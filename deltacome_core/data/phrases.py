"""Words and patterns from which `generate` writes its texts."""

NAMES = (
    "Amara", "Bjorn", "Chiara", "Dmitri", "Eleni", "Farid", "Greta", "Hassan", "Ines", "Jonas",
    "Keiko", "Liam", "Mina", "Nikhil", "Oksana", "Pedro", "Quentin", "Rosa", "Samuel", "Tomoko",
    "Ursula", "Viktor", "Wanjiru", "Xiomara", "Yusuf", "Zofia",
)  # fmt: skip
CITIES = (
    "Lisbon", "Nairobi", "Osaka", "Toronto", "Krakow", "Lima", "Hanoi", "Tunis", "Glasgow",
    "Bergen", "Izmir", "Perth", "Quito", "Leipzig", "Accra", "Tartu",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
THINGS = (
    "pencils", "tickets", "bottles", "lamps", "tiles", "bicycles", "stamps", "baskets", "valves",
    "notebooks", "oranges", "batteries", "chairs", "maps", "candles", "bolts",
)  # fmt: skip
DISHES = (
    "lentil soup", "an omelette", "fried rice", "a potato salad", "flatbread", "a fish stew",
    "roast peppers", "an apple cake",
)  # fmt: skip
CODE_NOUNS = (
    "order", "record", "token", "packet", "user", "invoice", "sample", "event", "row", "node",
    "message", "interval", "ticket", "block", "word", "edge",
)  # fmt: skip
CODE_VERBS = ("collect", "merge", "count", "filter", "rank", "split", "index", "sum", "group")

PROBLEMS = (
    (
        (
            "{name} packs {b} boxes with {a} {thing} each and then gives {c} {thing} to {other}. "
            "How many {thing} are left?"
        ),
        (
            "There are {a} * {b} = {ab} {thing}. After giving away {c}, {ab} - {c} = {left} "
            "remain. The answer is {left}."
        ),
    ),
    (
        "{name} has {a} {thing} and {other} has {b} more. How many {thing} does {other} have?",
        "{other} has {a} + {b} = {sum} {thing}. The answer is {sum}.",
    ),
    (
        "A shop sells {ac} {thing} in {c} days, the same number each day. How many a day?",
        "Divide the total by the days: {ac} / {c} = {a}. The answer is {a}.",
    ),
    (
        "A price of {hundred} euros falls by {b} per cent. What is the new price?",
        "{b} per cent of {hundred} is {ab}. {hundred} - {ab} = {rest}. The answer is {rest}.",
    ),
    (
        "A garden is {b} metres long and {c} metres wide. Find its area and its perimeter.",
        (
            "The area is {b} * {c} = {area} square metres. The perimeter is 2 * ({b} + {c}) = "
            "{edge} metres. The answers are {area} and {edge}."
        ),
    ),
    (
        "Solve for x: x + {b} * {c} = {a}.",
        (
            "First {b} * {c} = {area}. Subtract it on both sides: x = {a} - {area} = {root}. "
            "The answer is {root}."
        ),
    ),
    (
        "Show that the square of {b} plus {b} is divisible by 2.",
        (
            "{b} * {b} = {square}, and n * n + n = n * (n + 1). One of two neighbours is even, so "
            "the product is even. Hence {square} + {b} is divisible by 2."
        ),
    ),
    (
        (
            "A train covers {ac} kilometres in {c} hours. {name} rides it for {b} hours. How far "
            "does {name} travel?"
        ),
        (
            "The speed is {ac} / {c} = {a} kilometres per hour. In {b} hours that is {a} * {b} = "
            "{ab} kilometres. The answer is {ab}."
        ),
    ),
)

PROGRAMS = (
    (
        "Write a function that returns the {noun}s which occur more than {limit} times.",
        (
            "from collections import Counter\n\n\ndef frequent_{noun}s({noun}s):\n"
            "    counts = Counter({noun}s)\n"
            "    return sorted(item for item, n in counts.items() if n > {limit})"
        ),
    ),
    (
        "Write a class {noun} queue that drops the oldest entry when it holds {limit}.",
        (
            "from collections import deque\n\n\nclass {noun}_queue:\n    def __init__(self):\n"
            "        self._items = deque(maxlen={limit})\n\n    def push(self, {noun}):\n"
            "        self._items.append({noun})\n\n    def __len__(self):\n"
            "        return len(self._items)"
        ),
    ),
    (
        "Write a function that can {verb} {noun}s by their {other}.",
        (
            "def {verb}_{noun}s({noun}s):\n    by_{other} = {{}}\n    for {noun} in {noun}s:\n"
            '        by_{other}.setdefault({noun}["{other}"], []).append({noun})\n'
            "    return by_{other}"
        ),
    ),
    (
        "Write a binary search over a sorted list of {noun}s.",
        (
            "def find_{noun}(sorted_{noun}s, wanted):\n    low, high = 0, len(sorted_{noun}s)\n"
            "    while low < high:\n        middle = (low + high) // 2\n"
            "        if sorted_{noun}s[middle] < wanted:\n            low = middle + 1\n"
            "        else:\n            high = middle\n"
            "    found = low < len(sorted_{noun}s) and sorted_{noun}s[low] == wanted\n"
            "    return low if found else None"
        ),
    ),
    (
        "Read {noun}s from a CSV file and keep the last {limit}.",
        (
            "import csv\nfrom pathlib import Path\n\n\ndef read_{noun}s(path: Path):\n"
            '    with path.open(newline="") as file:\n        rows = list(csv.DictReader(file))\n'
            '    return [row["{noun}"] for row in rows[-{limit}:]]'
        ),
    ),
    (
        "Write SQL that counts {noun}s per {other} and keeps the groups above {limit}.",
        (
            'QUERY = """\nSELECT {other}_id, COUNT(*) AS n\nFROM {noun}s\nGROUP BY {other}_id\n'
            'HAVING COUNT(*) > {limit}\nORDER BY n DESC;\n"""'
        ),
    ),
    (
        "Retry sending a {noun} up to {limit} times with a growing pause.",
        (
            "import time\n\n\ndef send_{noun}(send, {noun}):\n    for attempt in range({limit}):\n"
            "        try:\n            return send({noun})\n        except ConnectionError:\n"
            "            time.sleep(min(2 ** attempt, 60))\n"
            '    raise TimeoutError("gave up after {limit} attempts")'
        ),
    ),
    (
        "Write a test that an empty list of {noun}s has no {other}.",
        (
            "def test_no_{noun}s_means_no_{other}():\n    assert {verb}_{noun}s([]) == {{}}\n\n\n"
            "def test_one_{noun}_has_one_{other}():\n"
            '    {noun} = {{"{other}": {limit}}}\n    assert {verb}_{noun}s([{noun}]) == '
            "{{{limit}: [{noun}]}}"
        ),
    ),
)

DIALOGUES = (
    (
        "How do I get from the airport to the centre of {city}?",
        (
            "Take the train from the lower level. It leaves every {number} minutes and needs no "
            "reservation. A taxi is quicker only at night."
        ),
        "Is the train running on {day} as well?",
        "Yes. On {day} the first one leaves a little later, so check the board in the hall.",
    ),
    (
        "I want to cook {dish} for {number} people. Where do I start?",
        (
            "Start with the slowest part. Wash and cut everything first, salt the water, and keep "
            "a third of the spices for the end."
        ),
        "What if it turns out too salty?",
        (
            "Add more of the unsalted base, or something sour. A raw potato does not help, "
            "whatever people say."
        ),
    ),
    (
        "My computer says the disk is full, but I deleted {number} large files.",
        (
            "Deleted files stay in the bin until it is emptied, and a program may still hold them "
            "open. Empty the bin, then restart."
        ),
        "I did both. It still says full.",
        (
            "Then look for snapshots. List them, remove the oldest, and check the free space again "
            "after a minute."
        ),
    ),
    (
        "Please write a polite note to {name} that the {thing} will arrive late.",
        (
            "Dear {name}, the {thing} you ordered will reach you on {day} instead of the date we "
            "promised. We are sorry for the delay and have refunded the delivery fee."
        ),
        "Make it shorter.",
        "Dear {name}, your {thing} will arrive on {day}. We are sorry for the delay.",
    ),
    (
        "Explain to a child why the sky is blue.",
        (
            "Sunlight is made of many colours. The air bounces the blue ones around more than the "
            "red ones, so blue comes at you from everywhere."
        ),
        "And why is the sunset red?",
        (
            "In the evening the light has a longer way through the air. Most of the blue has "
            "bounced away by then, and the red is what is left."
        ),
    ),
    (
        (
            "Summarise: the council of {city} met on {day}, heard {number} speakers, and put off "
            "its decision about the {thing}."
        ),
        "The council of {city} heard {number} speakers on {day} and made no decision.",
        "What was it about?",
        "It was about the {thing}. The decision has been put off.",
    ),
    (
        "Give me three ideas for a present for {name}, who likes {thing}.",
        (
            "1. A book about the history of {thing}.\n2. A day trip to {city}.\n3. A class in "
            "which one learns to make {dish}."
        ),
        "Which is the cheapest?",
        "The book, and it can be wrapped.",
    ),
)

SENTENCES = (
    "The survey in {city} covered {number} households, of which {percent} per cent replied.",
    "On {day} the temperature fell below zero and the pumps had to be drained by hand.",
    "{name} wrote the minutes and sent them round before anyone had left the building.",
    "A second measurement, made with a different instrument, gave nearly the same value.",
    "Nobody could say who had ordered {number} {thing}, but the bill was correct.",
    "The path climbs for an hour through beech woods and then opens on a stony plateau.",
    "Because the sample was small, the difference may well be due to chance.",
    "In the kitchen someone was making {dish}, and the smell reached the street.",
    "According to the manual the valve closes at {percent} per cent of the rated pressure.",
    "The proof rests on a simple remark: a bounded sequence that never falls must settle.",
    "Later that week {name} travelled to {city} with two suitcases and no coat.",
    "If the cable is longer than {number} metres, use a repeater or lower the speed.",
    "The court found that the notice had been given in time and dismissed the claim.",
    "Most of the {thing} were made before the war and have been repaired more than once.",
    "What surprised the team was not the failure itself but how quietly it had happened.",
    "Every {day} the market fills the square, and by noon the best of it is gone.",
    "The enzyme works fastest at body temperature and stops above sixty degrees.",
    "She kept the letters in a tin, in the order in which they had come.",
    "A loan of {number} thousand at {percent} per cent is not the same as it was last year.",
    "The old theatre in {city} will reopen with a play that closed it a century ago.",
    "There are two ways to read the rule, and the ministry has at times used both.",
    "Heavy rain had washed out the lower road, so the bus went round by the dam.",
    "Version {number} of the protocol removes the handshake and adds a checksum.",
    "He learned the language from sailors and never lost the vocabulary.",
    "The figures for {city} are higher, partly because the border was moved.",
    "Before you begin, switch off the current and hang a sign on the fuse box.",
    "It is not known whether the birds follow the coast or cross the open sea.",
    "Once the glue has set, sand the edge lightly and wipe away the dust.",
    "The index fell by {number} points, recovered by lunch, and ended where it began.",
    "In my opinion the third chapter should come first, and the first could go.",
)
