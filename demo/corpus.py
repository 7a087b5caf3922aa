"""Training text as packed rows: several short documents a row, each with its own mask and positions.

Shapes: N rows, S = 256 tokens a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from . import code
from .records import FAMILIES, SPLITS, Family, Split, generate
from .tokenizer import ASSISTANT, END, train_tokenizer

ROW_TOKENS = 256
OPEN_ROWS = 24

# Documents of the endless families; `code` and `chat` are as long as the standard library.
NUM_DOCUMENTS: dict[Split, int] = {"train": 120_000, "held_out": 128}


@dataclass(frozen=True, slots=True)
class Rows:
    """Packed documents.

    `tokens` [N, S] uint16; `document` [N, S] uint8, 1, 2, ... within a row and 0 for padding; `is_target`
    [N, S] bool, whether predicting this token counts in the loss.
    """

    tokens: np.ndarray
    document: np.ndarray
    is_target: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def pack(documents: Iterable[tuple[list[int], list[bool]]]) -> Rows:
    """Put documents into rows, first fit among the last few rows, dropping any that is longer than a row."""
    packed: list[tuple[list[int], list[int], list[bool]]] = []
    for ids, targets in documents:
        if len(ids) > ROW_TOKENS:
            continue
        for row in packed[-OPEN_ROWS:]:
            if len(row[0]) + len(ids) <= ROW_TOKENS:
                break
        else:
            row = ([], [], [])
            packed.append(row)
        number = row[1][-1] + 1 if row[1] else 1
        row[0].extend(ids)
        row[1].extend([number] * len(ids))
        row[2].extend(targets)
    rows = Rows(
        np.zeros((len(packed), ROW_TOKENS), np.uint16),
        np.zeros((len(packed), ROW_TOKENS), np.uint8),
        np.zeros((len(packed), ROW_TOKENS), bool),
    )
    for at, (tokens, document, is_target) in enumerate(packed):
        rows.tokens[at, : len(tokens)] = tokens
        rows.document[at, : len(tokens)] = document
        rows.is_target[at, : len(tokens)] = is_target
    return rows


def load(folder: Path, seed: int) -> tuple[PreTrainedTokenizerFast, dict[tuple[Family, Split], Rows]]:
    """The tokenizer and every family's rows, from the cache in `folder` or made and cached there."""
    cache = folder / f"corpus-{seed}.npz"
    if not cache.exists():
        build(folder, seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    with np.load(cache) as arrays:
        rows = {
            (family, split): Rows(*(arrays[f"{family}.{split}.{name}"] for name in Rows.__slots__))
            for family in FAMILIES
            for split in SPLITS
        }
    return tokenizer, rows


def build(folder: Path, seed: int) -> None:
    """Train the tokenizer, encode and pack all families, and write both under `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    arrays = {}
    for family in FAMILIES:
        for split in SPLITS:
            rows = pack(encode(tokenizer, family, split, seed))
            for name in Rows.__slots__:
                arrays[f"{family}.{split}.{name}"] = getattr(rows, name)
    partial = folder / f"corpus-{seed}.partial.npz"
    np.savez(partial, **arrays)
    partial.rename(folder / f"corpus-{seed}.npz")


def encode(
    tokenizer: PreTrainedTokenizerFast, family: Family, split: Split, seed: int
) -> Iterable[tuple[list[int], list[bool]]]:
    """Token ids and loss masks of a family's documents: answers count, and for `code` everything does."""
    limit = NUM_DOCUMENTS[split]
    texts = [record.text for record in itertools.islice(generate(family, split, seed), limit)]
    if family == "code" and split == "train":
        texts += code.excerpts(split)
    assistant, end = (tokenizer.convert_tokens_to_ids(token) for token in (ASSISTANT, END))
    for start in range(0, len(texts), 1000):
        for ids in tokenizer(texts[start : start + 1000], add_special_tokens=False)["input_ids"]:
            # Excerpts are cut by characters; a cut record would teach answers that stop short.
            if ids[-1] != end:
                ids = ids[:ROW_TOKENS]
            if family == "code" and split == "train":
                yield ids, [True] * len(ids)
                continue
            targets, answering = [], False
            for token in ids:
                targets.append(answering)
                answering = (answering or token == assistant) and token != end
            yield ids, targets
