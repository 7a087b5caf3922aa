"""The demo model's committed held-out records as documents of lm-evaluation-harness."""

import json
import re
from pathlib import Path

from datasets import Dataset, DatasetDict

PROMPTS = Path(__file__).parents[2] / "demo" / "model" / "prompts.jsonl"


def math(**kwargs):
    """Return the records of arithmetic."""
    return DatasetDict({"test": Dataset.from_list(_records("math"))})


def extraction(**kwargs):
    """Return the records of fields to look up."""
    return DatasetDict({"test": Dataset.from_list(_records("extraction"))})


def math_choices(**kwargs):
    """Return arithmetic with four answers each: the right one, and three with another last line."""
    documents = []
    for record in _records("math"):
        right = record["answer"]
        head, result = re.fullmatch(r"(.*Answer: )(-?\d+)", right, re.DOTALL).groups()
        wrong = [f"{head}{int(result) + off}" for off in (1, -1, 10)]
        place = len(record["prompt"]) % 4  # not always the first
        choices = [*wrong[:place], right, *wrong[place:]]
        documents.append({"prompt": record["prompt"], "choices": choices, "gold": place})
    return DatasetDict({"test": Dataset.from_list(documents)})


def _records(family):
    records = []
    for line in PROMPTS.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["family"] == family:
            turns = (
                f"<|{turn['role']}|>{turn['content']}{'<|end|>' if turn['role'] == 'assistant' else ''}"
                for turn in record["messages"]
            )
            records.append({"prompt": f"{''.join(turns)}<|assistant|>", "answer": record["answer"]})
    return records
