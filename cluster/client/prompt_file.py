"""A file of prompts: JSONL whose lines have ``messages`` (a chat) or ``prompt`` (a text)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .client import Prompt


def read_prompts(path: Path) -> list[Prompt]:
    """Return a file's prompts; raise ``ValueError`` naming ``data`` and the line for what is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"data: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8 text: {error}") from error
    prompts = list(_prompts(path, lines))
    if not prompts:
        raise ValueError(f"data: {path} holds no prompt")
    return prompts


def _prompts(path: Path, lines: list[str]) -> Iterator[Prompt]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"data: line {number} of {path} is not JSON: {error}") from error
        yield _prompt(record, f"line {number} of {path}")


def _prompt(record: Any, where: str) -> Prompt:
    prompt = messages = None
    if isinstance(record, dict):
        prompt, messages = record.get("prompt"), record.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
        return messages
    if isinstance(prompt, str) and prompt:
        return prompt
    raise ValueError(f"data: {where} has neither messages nor a prompt")
