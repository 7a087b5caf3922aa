"""The contract of the demo model's task data: records, families, splits, and the one generator over them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Family = Literal["code", "math", "extraction", "chat"]
Split = Literal["train", "held_out"]

FAMILIES: tuple[Family, ...] = get_args(Family)
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation: `messages` end with a user's turn, `answer` is the assistant's expected reply.

    For `math` and `extraction` the answer is the only right one (exact match); for `code` and `chat` it is a
    reference for a loss, not a string to be matched. `source` names where the record is from (a file of the
    standard library, a documentation topic) and is empty for generated records.
    """

    family: Family
    messages: tuple[Message, ...]
    answer: str
    source: str = ""

    @property
    def prompt(self) -> str:
        """The text the model continues, special tokens included; equals the chat template's output."""
        return render(self.messages) + "<|assistant|>"

    @property
    def text(self) -> str:
        """The whole training document: prompt, answer and the end token."""
        return f"{self.prompt}{self.answer}<|end|>"

    def chat(self) -> list[dict[str, str]]:
        """The messages as the OpenAI API and `apply_chat_template` take them."""
        return [{"role": message.role, "content": message.content} for message in self.messages]


def render(messages: tuple[Message, ...]) -> str:
    """The training format of `messages`: a role token before each turn, `<|end|>` after the assistant's."""
    return "".join(
        f"<|{message.role}|>{message.content}{'<|end|>' if message.role == 'assistant' else ''}" for message in messages
    )


def held_out(key: str, modulus: int = 19) -> bool:
    """Whether the item named `key` is kept out of training: one in `modulus`, the same on every machine."""
    return zlib.crc32(key.encode()) % modulus == 0


def generate(family: Family, split: Split, seed: int = 0) -> Iterator[Record]:
    """Yield records of one family; the same seed (and Python version, see below) gives the same records.

    `math` and `extraction` are endless and do not depend on the Python version. `code` and `chat` are derived
    from the standard library of the running Python: one finite, shuffled pass, different between versions;
    `prompts.load` has prompts that are the same everywhere. No prompt of split `held_out` occurs in `train`,
    and `held_out` repeats no prompt within one iterator.
    """
    from . import arithmetic, chat, code, extraction

    generators: dict[str, Callable[[Split, int], Iterator[Record]]] = {
        "code": code.records,
        "math": arithmetic.records,
        "extraction": extraction.records,
        "chat": chat.records,
    }
    if family not in generators:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {family!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    return _distinct(generators[family](split, seed)) if split == "held_out" else generators[family](split, seed)


def _distinct(records: Iterator[Record]) -> Iterator[Record]:
    seen: set[tuple[Message, ...]] = set()
    for record in records:
        if record.messages not in seen:
            seen.add(record.messages)
            yield record
