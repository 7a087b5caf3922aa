"""Sums and differences worked column by column, so that every carry is a token the model can read back."""

from __future__ import annotations

import random
from collections.abc import Iterator

from .records import Message, Record, Split

# Operands by number of digits. One-digit operands are rare: there are few such pairs, and no carries to learn.
DIGITS = (1, 2, 3)
DIGIT_WEIGHTS = (1, 4, 5)


def held_out_pair(a: int, b: int, minus: bool) -> bool:
    """Whether the problem `a + b` (or `a - b`) is never trained on."""
    return (1009 * a + 31 * b + minus) % 19 == 0


def worked_answer(a: int, b: int, minus: bool) -> str:
    """The columns from the right, `digit op digit op carry: write digit carry digit`, then `Answer: n`."""
    sign = "-" if minus else "+"
    lines, carry = [], 0
    for column in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**column % 10, b // 10**column % 10
        total = x - y - carry if minus else x + y + carry
        carry_in, carry = carry, int(total < 0 if minus else total > 9)
        lines.append(f"{x} {sign} {y} {sign} {carry_in}: write {total % 10} carry {carry}")
    return "\n".join([*lines, f"Answer: {a - b if minus else a + b}"])


def records(split: Split, seed: int) -> Iterator[Record]:
    """Endless problems with operands of one to three digits; differences are never negative."""
    rng = random.Random(f"math {split} {seed}")
    while True:
        first, second = rng.choices(DIGITS, DIGIT_WEIGHTS, k=2)
        a = rng.randrange(10 ** (first - 1), 10**first)
        b = rng.randrange(10 ** (second - 1), 10**second)
        minus = rng.random() < 0.5
        if minus and a < b:
            a, b = b, a
        if held_out_pair(a, b, minus) != (split == "held_out"):
            continue
        question = f"{a} {'-' if minus else '+'} {b}"
        yield Record("math", (Message("user", question),), worked_answer(a, b, minus))
