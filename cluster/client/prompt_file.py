"""A file of prompts: JSONL whose lines have ``messages`` (a chat) or ``prompt`` (a text), and perhaps ``answer``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .client import Prompt


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One line."""

    where: str
    """Its number and file, for errors."""
    prompt: Prompt
    answer: str | None
    """The only right one, where there is one."""


def read_prompts(path: Path) -> list[Prompt]:
    """Return a file's prompts; raise ``ValueError`` naming ``data`` and the line for what is none."""
    return [record.prompt for record in read_records(path)]


def read_records(path: Path) -> list[PromptRecord]:
    """Return a file's lines, blank ones left out; raise ``ValueError`` naming ``data`` and the line for others."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"data: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8 text: {error}") from error
    records = list(_records(path, lines))
    if not records:
        raise ValueError(f"data: {path} holds no prompt")
    return records


def _records(path: Path, lines: list[str]) -> Iterator[PromptRecord]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"data: line {number} of {path} is not JSON: {error}") from error
        where = f"line {number} of {path}"
        prompt = _prompt(record, where)
        answer = record.get("answer")
        if answer is not None and not isinstance(answer, str):
            raise ValueError(f"data: {where}: answer: expected text, got {type(answer).__name__}")
        yield PromptRecord(where, prompt, answer)


def _prompt(record: Any, where: str) -> Prompt:
    prompt = messages = None
    if isinstance(record, dict):
        prompt, messages = record.get("prompt"), record.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
        return messages
    if isinstance(prompt, str) and prompt:
        return prompt
    raise ValueError(f"data: {where} has neither messages nor a prompt")
