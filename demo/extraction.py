"""Records of `key: value` lines and questions for some of the keys.

The answer echoes each key, and the question writes keys right after ':' or ',': a key is then the same tokens in
the record, the question and the answer, so looking a value up is induction on (key, ':').
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from .records import Message, Record, Split, held_out

SYLLABLES = [c + v for c in "bcdfghjklmnprstvz" for v in "aeiou"]
NAMES = [
    "Ada",
    "Alan",
    "Barbara",
    "Claude",
    "Donald",
    "Edsger",
    "Emmy",
    "Grace",
    "Hedy",
    "Ivan",
    "Joan",
    "Karen",
    "Linus",
    "Maria",
    "Niklaus",
    "Olga",
]
COLOURS = ["red", "green", "blue", "white", "black", "amber", "violet", "silver", "orange", "teal"]
STATES = ["open", "closed", "pending", "shipped", "cancelled", "active", "paused", "failed", "ready", "lost"]
LEVELS = ["low", "normal", "high", "urgent"]
SUFFIXES = ["net", "org", "com", "dev", "io"]


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3)))


def _host(rng: random.Random) -> str:
    return f"{_word(rng)}.{rng.choice(SUFFIXES)}"


KINDS: dict[str, Callable[[random.Random], str]] = {
    "name": lambda rng: rng.choice(NAMES),
    "place": lambda rng: _word(rng).capitalize(),
    "word": _word,
    "label": lambda rng: f"{_word(rng)[:4].upper()}-{rng.randint(10, 99)}",
    "host": _host,
    "email": lambda rng: f"{_word(rng)}@{_host(rng)}",
    "state": lambda rng: rng.choice(STATES),
    "level": lambda rng: rng.choice(LEVELS),
    "colour": lambda rng: rng.choice(COLOURS),
    "date": lambda rng: f"{rng.randint(1990, 2039)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
    "clock": lambda rng: f"{rng.randint(0, 23):02}.{rng.randint(0, 59):02}",
    "money": lambda rng: f"{rng.randint(1, 999)}.{rng.randint(0, 99):02}",
    "count": lambda rng: str(rng.randint(0, 9999)),
    "version": lambda rng: f"v{rng.randint(0, 9)}.{rng.randint(0, 20)}",
    "phone": lambda rng: f"555-{rng.randint(0, 9999):04}",
}

KEYS = {
    "agent": "name",
    "owner": "name",
    "city": "place",
    "team": "place",
    "project": "word",
    "user": "word",
    "code": "label",
    "order": "label",
    "host": "host",
    "email": "email",
    "status": "state",
    "level": "level",
    "color": "colour",
    "date": "date",
    "time": "clock",
    "price": "money",
    "count": "count",
    "version": "version",
    "phone": "phone",
}

# Records whose values are of another key's kind: without them the model guesses from the key, not the record.
WILD_SHARE = 0.3


def fields(rng: random.Random) -> dict[str, str]:
    """Three to eight fields in random order."""
    keys = rng.sample(list(KEYS), rng.randint(3, 8))
    wild = rng.random() < WILD_SHARE
    return {key: KINDS[rng.choice(list(KINDS)) if wild else KEYS[key]](rng) for key in keys}


def records(split: Split, seed: int) -> Iterator[Record]:
    """Endless records with one to three questions each (one for `held_out`), each for one to three keys."""
    rng = random.Random(f"extraction {split} {seed}")
    while True:
        values = fields(rng)
        document = "\n".join(f"{key}: {value}" for key, value in values.items())
        if held_out(document) != (split == "held_out"):
            continue
        turns: list[Message] = []
        answer = ""
        for turn in range(rng.choice((1, 1, 2, 3)) if split == "train" else 1):
            keys = rng.sample(list(values), rng.randint(1, min(3, len(values))))
            question = f"get:{','.join(keys)}"
            if turn:
                turns += [Message("assistant", answer), Message("user", question)]
            else:
                turns.append(Message("user", f"{document}\n{question}"))
            answer = "\n".join(f"{key}: {values[key]}" for key in keys)
        yield Record("extraction", tuple(turns), answer)
