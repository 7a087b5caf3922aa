"""The questions of a calibration, from a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .quality import Question


class PromptTokenizer(Protocol):
    """What turns prompts into tokens; both methods raise ``ValueError`` for what they cannot."""

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of a text to be continued."""
        ...

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the ids of a conversation, ready for the next turn."""
        ...


def read_questions(
    file: Path, tokenizer: PromptTokenizer, *, max_prompt_tokens: int, num_records: int | None = None
) -> list[Question]:
    """Return the first ``num_records`` questions of ``file``, all when None.

    Each line is an object with ``messages`` (a chat) or ``prompt`` (a text), and ``answer`` where there is one right
    answer; other keys are ignored. Raises ``ValueError`` naming ``data`` and the line.
    """
    questions: list[Question] = []
    for number, record in _records(file):
        if len(questions) == num_records:
            break
        try:
            questions.append(_question(record, tokenizer, max_prompt_tokens))
        except ValueError as error:
            raise ValueError(f"data: {file} line {number}: {error}") from error
    if not questions:
        raise ValueError(f"data: {file} holds no records")
    return questions


def _records(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"data: {file} line {number}: not JSON: {error}") from error
    except OSError as error:
        raise ValueError(f"data: cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {file} is not UTF-8 text: {error}") from error


def _question(record: Any, tokenizer: PromptTokenizer, max_prompt_tokens: int) -> Question:
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    messages: Any = record.get("messages")
    prompt, answer = record.get("prompt"), record.get("answer")
    if (messages is None) == (prompt is None):
        raise ValueError("expected either messages or prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"prompt: expected text, got {type(prompt).__name__}")
    if answer is not None and not isinstance(answer, str):
        raise ValueError(f"answer: expected text, got {type(answer).__name__}")
    token_ids = tokenizer.encode(prompt) if prompt is not None else tokenizer.encode_chat(messages)
    if not 1 <= len(token_ids) <= max_prompt_tokens:
        raise ValueError(f"a prompt of {len(token_ids)} tokens is not in [1, {max_prompt_tokens}]")
    return Question(tuple(token_ids), answer)
