"""A prompt of any kind to a `Backend` at hand: what a client inside the cluster and one without a server share."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ..api.chat_tokenizer import ChatTokenizer
from ..api.protocol import DEFAULT_MAX_TOKENS
from ..api.text_stream import TextDelta, stream_text
from ..engine.backend import Backend
from .client import Prompt
from .request_params import RequestParams


async def stream_prompt(
    backend: Backend, tokenizer: ChatTokenizer, max_model_len: int, prompt: Prompt, params: Mapping[str, Any]
) -> AsyncGenerator[TextDelta, None]:
    """Generate one output piece by piece; ``params`` are those of `RequestParams`.

    Raises ``ValueError`` naming the field, ``EngineDeadError``.
    """
    asked = RequestParams.from_kwargs(**params)
    sampling = asked.sampling
    is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    if is_chat:
        chat: Any = prompt
        token_ids = await asyncio.to_thread(tokenizer.encode_chat, chat, max_tokens=max_model_len)
    elif isinstance(prompt, str):
        token_ids = await asyncio.to_thread(tokenizer.encode, prompt, max_tokens=max_model_len)
    else:
        token_ids = list(prompt)  # type: ignore[arg-type]
    if sampling.max_tokens is None and not is_chat:
        room = max(1, max_model_len - len(token_ids))
        sampling = replace(sampling, max_tokens=min(DEFAULT_MAX_TOKENS, room))
    speculation = asked.speculation
    if asked.prediction:
        speculation = await asyncio.to_thread(asked.encode, tokenizer, max_model_len)
    deltas = stream_text(backend, tokenizer, f"handle-{uuid.uuid4().hex}", token_ids, sampling, speculation)
    async with aclosing(deltas):
        async for delta in deltas:
            yield delta
