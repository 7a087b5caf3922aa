"""Held-out prompts that are the same on every machine: `model/prompts.jsonl`.

`records.generate` derives code and chat from the running Python's library, which differs between versions; these
are a fixed sample of it. `python -m penstock.demo.prompts` writes the file again.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

from .records import FAMILIES, Family, Message, Record, generate

PROMPTS = Path(__file__).parent / "model" / "prompts.jsonl"
PER_FAMILY = 64
SEED = 0


def load(family: Family) -> list[Record]:
    """The committed held-out records of a family, 64 of them, in a fixed order."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {family!r}")
    found = []
    for line in PROMPTS.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        if fields["family"] == family:
            fields["messages"] = tuple(Message(**message) for message in fields["messages"])
            found.append(Record(**fields))
    return found


def write() -> None:
    """Sample the running Python's held-out records into the committed file."""
    lines = [
        json.dumps(dataclasses.asdict(record), ensure_ascii=False)
        for family in FAMILIES
        for record in itertools.islice(generate(family, "held_out", SEED), PER_FAMILY)
    ]
    PROMPTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
