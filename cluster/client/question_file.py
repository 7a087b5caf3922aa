"""The questions of a calibration, from a file of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..calibration.quality import Question
from .prompt_file import PromptRecord, read_records


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

    Raises ``ValueError`` naming ``data`` and the line for a prompt that the model cannot take.
    """
    return [_question(record, tokenizer, max_prompt_tokens) for record in read_records(file)[:num_records]]


def _question(record: PromptRecord, tokenizer: PromptTokenizer, max_prompt_tokens: int) -> Question:
    prompt: Any = record.prompt
    try:
        token_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)
    except ValueError as error:
        raise ValueError(f"data: {record.where}: {error}") from error
    if not 1 <= len(token_ids) <= max_prompt_tokens:
        raise ValueError(f"data: {record.where}: {len(token_ids)} tokens are not in [1, {max_prompt_tokens}]")
    return Question(tuple(token_ids), record.answer)
