"""Measure the shipped model on held-out records: `python -m penstock.demo.evaluate`.

Loads the model through transformers in float32, prints what it finds, and writes `evaluation.json` and the model
card beside the weights.
"""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cyclopts
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import card
from .export import MODEL
from .records import FAMILIES, Family, Record, generate

EXACT: tuple[Family, ...] = ("math", "extraction")
MAX_NEW_TOKENS = {"code": 128, "chat": 128, "math": 96, "extraction": 96}
# Not the seed of the committed prompts nor of the validation rows: both may have steered decisions.
SEED = 1
BATCH = 32

app = cyclopts.App(help=__doc__)


def load(model: Path = MODEL) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer, which pads on the left."""
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), tokenizer


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    max_new_tokens: int,
) -> list[list[int]]:
    """Greedy answers as token ids, without the end token; an answer of `max_new_tokens` did not end."""
    inputs: Any = tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answers = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [list(itertools.takewhile(lambda token: token != tokenizer.eos_token_id, answer)) for answer in answers]


@torch.no_grad()
def answer_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]
) -> tuple[float, int]:
    """Cross-entropy in nats a token of the answers, end token included, and the number of those tokens."""
    total, count = 0.0, 0
    for record in track(records, f"loss {records[0].family}", console=Console(stderr=True), transient=True):
        prompt = tokenizer(record.prompt, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([tokenizer(record.text, add_special_tokens=False)["input_ids"]])
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
        total += F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
        count += len(logits)
    return total / count, count


def distinct_ratio(tokens: Sequence[int], n: int = 4) -> float:
    """Distinct n-grams over all n-grams of one answer: 1 if nothing repeats, near 0 in a loop."""
    grams = list(zip(*(tokens[start:] for start in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, family: Family, items: int, samples: int
) -> dict[str, Any]:
    """Loss, exact match (math, extraction: `items` greedy answers) or loop measures (code, chat: `samples`)."""
    records = list(itertools.islice(generate(family, "held_out", SEED), items))
    loss, count = answer_loss(model, tokenizer, records)
    answered = records if family in EXACT else records[:samples]
    # Sorted by length, so that a batch has little padding.
    answered = sorted(answered, key=lambda record: len(record.prompt))
    limit = MAX_NEW_TOKENS[family]
    answers: list[list[int]] = []
    batches = range(0, len(answered), BATCH)
    for start in track(batches, f"answers {family}", console=Console(stderr=True), transient=True):
        batch = [record.chat() for record in answered[start : start + BATCH]]
        answers += complete(model, tokenizer, batch, limit)
    alone = range(0, len(answered), max(1, len(answered) // 8))
    result: dict[str, Any] = {
        "loss": round(loss, 4),
        "loss_records": len(records),
        "loss_tokens": count,
        "answers": len(answered),
        "mean_answer_tokens": round(sum(map(len, answers)) / len(answers), 1),
        "ended": sum(len(answer) < limit for answer in answers),
        "distinct_4gram_ratio": round(sum(map(distinct_ratio, answers)) / len(answers), 3),
        "same_when_alone": sum(
            complete(model, tokenizer, [answered[at].chat()], limit)[0] == answers[at] for at in alone
        ),
        "tried_alone": len(alone),
    }
    if family in EXACT:
        texts = [tokenizer.decode(answer) for answer in answers]
        result["exact"] = sum(text == record.answer for text, record in zip(texts, answered, strict=True))
        result["exact_share"] = round(result["exact"] / len(answered), 4)
    return result


@app.default
def evaluate(*, items: int = 512, samples: int = 64, threads: int = 2, model: Path = MODEL) -> None:
    """Evaluate `items` held-out records a family (fewer where the library has fewer) and write the results."""
    torch.set_num_threads(threads)
    network, tokenizer = load(model)
    results = {
        "families": {family: measure(network, tokenizer, family, items, samples) for family in FAMILIES},
        "decoding": "greedy",
        "dtype": "float32",
        "device": "cpu",
        "threads": threads,
        "batch": BATCH,
        "seed": SEED,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    text = json.dumps(results, indent=2) + "\n"
    (model / "evaluation.json").write_text(text)
    card.write(model)
    print(text)


if __name__ == "__main__":
    app()
