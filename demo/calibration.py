"""What the demo model's budgets of experts are calibrated on: `model/calibration.jsonl`.

Sums and look-ups, whose answers are right or wrong, and some code and chat, whose words may change.
`python -m penstock.demo.calibration` writes the file again; seeds differ from those of the other held-out records.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from . import prompts
from .records import Family, Record, generate

CALIBRATION = Path(__file__).parent / "model" / "calibration.jsonl"
TASKS: tuple[Family, ...] = ("math", "extraction")
PER_TASK = 256
TEXTS: tuple[Family, ...] = ("code", "chat")
PER_TEXT = 32
SEED = 5


def _line(record: Record, *, with_answer: bool) -> str:
    fields: dict[str, object] = {"messages": record.chat()}
    if with_answer:
        fields["answer"] = record.answer
    return json.dumps(fields, ensure_ascii=False)


def write() -> None:
    """Write tasks and texts, families in turns, so that the first lines of the file are a sample of it."""
    families = [
        [_line(record, with_answer=True) for record in itertools.islice(generate(family, "held_out", SEED), PER_TASK)]
        for family in TASKS
    ]
    texts = [[_line(record, with_answer=False) for record in prompts.load(family)[:PER_TEXT]] for family in TEXTS]
    every = PER_TASK // PER_TEXT
    lines: list[str] = []
    for index, tasks in enumerate(zip(*families, strict=True)):
        lines += tasks
        if index % every == 0:
            lines += [family[index // every] for family in texts]
    CALIBRATION.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
