"""The model card, `model/README.md`: its figures come from `training.json` and `evaluation.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .extraction import KEYS

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [moe, qwen3_moe, demo]
---

# Penstock demo model

A Qwen3-MoE of {millions:.2f} M parameters, so small that it is part of the repository: 4 layers, hidden size 128,
4 heads of 32, 32 experts of which 4 serve a token, expert intermediate size 64, vocabulary 1024, float32. It is
there so that routing, draft acceptance and the quality cost of an approximation can be measured on something that
was really trained, on any machine, without a download. It is no assistant.

## What it does

| family | user | assistant |
|---|---|---|
| math | `851 - 72` | one line a column (`1 - 2 - 0: write 9 carry 1`), then `Answer: 779` |
| extraction | lines of `key: value`, then `get:key,key` | the asked lines; further `get:` turns may follow |
| code | header and docstring of a Python function | a body |
| chat | `What does Path.touch do?`, `Tell me about lambda.` | a docstring's or help topic's manner of text |

After `<|code|>` it continues plain Python text. Prompt format: `<|user|>...<|assistant|>...<|end|>`, in
turns; the tokenizer's chat template makes it, and puts system messages before the next user message.

## Results on held-out records

Greedy decoding by transformers {transformers} in {dtype} on {threads} CPU threads, batches of {batch}, Python
{python}, PyTorch {torch}; `python -m penstock.demo.evaluate` repeats them. Loss is the cross-entropy of the answers
in nats a token. Exact match counts an answer only if every character of it is right, the working included.

| family | loss (records, tokens) | exact match | mean answer tokens | ended | distinct 4-grams |
|---|---|---|---|---|---|
{table}

Answers are cut at 128 tokens (code, chat) or 96; "ended" counts those that stopped before. Distinct 4-grams: the
share of an answer's token 4-grams that are different, averaged over answers; a loop brings it near 0.
The same answers came out alone as in a batch in {alone} of {tried} tries.

## Training

{step:,} steps of 6 rows of 256 tokens, {tokens:.1f} M tokens ({targets:.1f} M of them in the loss), {minutes:.0f}
minutes on two CPU cores that also did other work (two data-parallel processes of one thread). AdamW, peak rate
4.5e-3 after 200 steps, flat for 55 % of the run, then linear to 2 %; betas 0.9 and 0.95, weight decay 0.05 on
matrices, clipping at 1, Switch auxiliary loss 0.01 a layer. Several documents share a row; attention and positions
are per document. The loss is on answers only, on everything for code.

    python -m penstock.demo.train --minutes {minutes:.0f}
    python -m penstock.demo.export
    python -m penstock.demo.evaluate

Rows by family: code .20, chat .10, math .35, extraction .35 in the first quarter, then .30, .16, .16, .38.

## Data

Math and extraction records are generated from a seed. Code and chat are made from the standard library of CPython
{trained_python}: functions, excerpts of source files, docstrings, and help topics of the language reference; chat has
a few hand-written greetings besides. Held out, and in no training row: operand pairs by a rule of the
operands (one in 19), extraction records by a checksum (one in 19), library files and topics by a checksum of their
name (one in 16).

## Limits

- Trained on documents of at most 256 tokens. The configuration allows 2048 positions, for tests of long contexts; do
  not expect sense there.
- Math has operands of one to three digits, written as in the table. Extraction has 3 to 8 fields, 1 to 3 keys a
  question, up to three questions a record, and these keys only: {keys}.
  Outside of that (four digits, four keys asked, other keys or wordings) it fails, usually with full confidence.
- Code and chat have the look of Python and of its documentation. What they say is made up, and long answers fall
  into repetition.
- English only, no safety training, nothing to rely on.

## Licences

The weights, tokenizer and configuration are under the Apache License 2.0, as the repository is.

`prompts.jsonl` quotes, and the training text was derived from, the Python standard library and documentation:
Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved. Used under the PSF License Version 2, whose
text and full notice are in `LICENSE-PSF-2.0.txt`. Files that carry another copyright or licence line were not used.
Summary of changes: functions were taken out of their files and dedented, docstrings and topics were cut into
paragraphs and put under questions, source files were cut into excerpts.
"""


def table(families: dict[str, dict[str, Any]]) -> str:
    """One row a family."""
    rows = []
    for family, result in families.items():
        exact = ""
        if "exact" in result:
            exact = f"{result['exact']} of {result['answers']} ({result['exact_share']:.1%})"
        rows.append(
            f"| {family} | {result['loss']:.4f} ({result['loss_records']}, {result['loss_tokens']}) | {exact} "
            f"| {result['mean_answer_tokens']} | {result['ended']} of {result['answers']} "
            f"| {result['distinct_4gram_ratio']} |"
        )
    return "\n".join(rows)


def write(model: Path) -> None:
    """Fill the card of the model in `model` from the two files of figures beside it."""
    training = json.loads((model / "training.json").read_text())
    evaluation = json.loads((model / "evaluation.json").read_text())
    families = evaluation["families"]
    text = CARD.format(
        millions=training["parameters"] / 1e6,
        step=training["step"],
        tokens=training["tokens"] / 1e6,
        targets=training["targets"] / 1e6,
        minutes=training["seconds"] / 60,
        trained_python=training["python"],
        table=table(families),
        keys=", ".join(KEYS),
        alone=sum(result["same_when_alone"] for result in families.values()),
        tried=sum(result["tried_alone"] for result in families.values()),
        dtype=evaluation["dtype"],
        threads=evaluation["threads"],
        batch=evaluation["batch"],
        **evaluation["versions"],
    )
    (model / "README.md").write_text(text, encoding="utf-8")
