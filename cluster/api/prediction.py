"""OpenAI's predicted outputs: what a client expects the output to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .chat_tokenizer import ChatTokenizer, text_content


def prediction_text(prediction: Mapping[str, Any]) -> str:
    """Return the text of ``{"type": "content", "content": text or text parts}``; ``ValueError`` names the part."""
    kind = prediction.get("type")
    if kind != "content":
        raise ValueError(f"prediction.type: {kind!r} is not supported; valid: 'content'")
    return text_content("prediction.content", prediction.get("content"))


def encode_prediction(tokenizer: ChatTokenizer, text: str, max_model_len: int | None = None) -> tuple[int, ...]:
    """Return the token ids of a prediction's text; raise ``ValueError`` for one far longer than ``max_model_len``."""
    return tuple(tokenizer.encode_prediction(text, max_tokens=max_model_len)) if text else ()
