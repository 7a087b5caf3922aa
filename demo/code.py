"""Python: functions to be completed from their header and docstring, and plain excerpts to train on."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Iterator

from . import stdlib
from .records import Message, Record, Split

# In characters; about 2.6 a token, so that a record fits a training row of 256 tokens.
MAX_RECORD_CHARS = 640
MAX_EXCERPT_CHARS = 640


def records(split: Split, seed: int) -> Iterator[Record]:
    """One shuffled pass over short functions: the user writes header and docstring, the answer is the body."""
    found: list[Record] = []
    trained: set[str] = set()
    for file in stdlib.files():
        if file.split != split and split == "train":
            continue
        for definition in stdlib.definitions(file):
            header = definition.header
            if not header.startswith(("def ", "async def ")) or definition.body.count("\n") < 2:
                continue
            if definition.docstring:
                quoted = textwrap.indent(f'"""{definition.docstring}"""', "    ", lambda line: bool(line.strip()))
                header = f"{header}\n{quoted}"
            if len(header) + len(definition.body) > MAX_RECORD_CHARS:
                continue
            if file.split != split:
                trained.add(header)
            else:
                found.append(Record("code", (Message("user", header),), definition.body, file.path))
    found = [record for record in found if record.messages[0].content not in trained]
    random.Random(f"code {split} {seed}").shuffle(found)
    return iter(found)


def excerpts(split: Split) -> Iterator[str]:
    """Plain training text in reading order: `<|code|>` and whole lines of a file, `<|end|>` where it ends."""
    for file in stdlib.files():
        if file.split != split:
            continue
        piece = ""
        for line in file.text.splitlines(keepends=True):
            if piece and len(piece) + len(line) > MAX_EXCERPT_CHARS:
                yield f"<|code|>{piece}"
                piece = ""
            piece += line
        if piece.strip():
            yield f"<|code|>{piece}<|end|>"
