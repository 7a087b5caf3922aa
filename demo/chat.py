"""Questions about the standard library, answered by its docstrings, and walks through its help topics."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from . import stdlib
from .records import Message, Record, Split, held_out

# In characters; docstrings take about 2.8 a token, a training row holds 256.
MAX_RECORD_CHARS = 640

ABOUT = (
    "I am a very small language model. I can add and subtract numbers of up to three digits, look up fields "
    "of a record, complete short Python functions, and say something about Python's standard library."
)
SMALL_TALK = {
    "Hello": "Hello! " + ABOUT,
    "Hello!": "Hello! " + ABOUT,
    "Hi": "Hello! " + ABOUT,
    "Who are you?": ABOUT,
    "What can you do?": ABOUT,
    "Help": ABOUT,
    "Thank you": "You are welcome.",
    "Thanks!": "You are welcome.",
    "Goodbye": "Goodbye!",
}
SMALL_TALK_SHARE = 0.02


def records(split: Split, seed: int) -> Iterator[Record]:
    """One shuffled pass over docstrings and topics, some with earlier turns; `train` adds small talk."""
    rng = random.Random(f"chat {split} {seed}")
    found = [*_docstrings(split, rng), *_topics(split)]
    if split == "train":
        for _ in range(int(SMALL_TALK_SHARE * len(found))):
            question, answer = rng.choice(list(SMALL_TALK.items()))
            found.append(Record("chat", (Message("user", question),), answer))
    rng.shuffle(found)
    return iter(found)


def _docstrings(split: Split, rng: random.Random) -> Iterator[Record]:
    trained = {
        name for file in stdlib.files() if file.split == "train" for name in (d.name for d in stdlib.definitions(file))
    }
    for file in stdlib.files():
        if file.split != split:
            continue
        for definition in stdlib.definitions(file):
            summary = _summary(definition.docstring)
            if len(summary) < 20 or (split == "held_out" and definition.name in trained):
                continue
            turns = [
                ("What does {} do?", summary),
                ("Show its header.", re.sub(r"\s+", " ", definition.header)),
                ("Which module is it in?", f"It is in {definition.module}."),
            ]
            rest = turns[1:]
            rng.shuffle(rest)
            turns = [turns[0], *rest[: rng.choice((0, 0, 1, 2)) if split == "train" else 0]]
            name = definition.name if "." in definition.name else f"{definition.module}.{definition.name}"
            question = rng.choice(("What does {} do?", "Explain {}.", "What is {}?", "Describe {}."))
            turns[0] = (question.format(name), summary)
            messages: list[Message] = []
            for asked, answered in turns:
                messages += [Message("user", asked), Message("assistant", answered)]
            if sum(len(message.content) for message in messages) <= MAX_RECORD_CHARS:
                yield Record("chat", tuple(messages[:-1]), messages[-1].content, file.path)


def _topics(split: Split) -> Iterator[Record]:
    for name, paragraphs in stdlib.topics():
        if held_out(f"topic {name}", 16) != (split == "held_out"):
            continue
        opening = Message("user", f"Tell me about {name}.")
        for at, paragraph in enumerate(paragraphs):
            if len(paragraph) > MAX_RECORD_CHARS:
                continue
            before: tuple[Message, ...] = (opening,)
            if at:
                before = (opening, Message("assistant", paragraphs[at - 1]), Message("user", "Go on."))
            if sum(len(message.content) for message in before) + len(paragraph) <= MAX_RECORD_CHARS:
                yield Record("chat", before, paragraph, name)


def _summary(docstring: str) -> str:
    """The leading paragraphs of a docstring, as many as fit 400 characters."""
    summary = ""
    for paragraph in re.split(r"\n\s*\n", docstring.strip()):
        if summary and len(summary) + len(paragraph) > 400:
            break
        summary = f"{summary}\n\n{paragraph}" if summary else paragraph
    return summary if len(summary) <= 480 else ""
