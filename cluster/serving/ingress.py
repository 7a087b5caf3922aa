"""The Serve deployment in front: OpenAI protocol and tokenisation over a gang somewhere in the cluster."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...workers.sampling_params import SamplingParams
from ..api.chat_tokenizer import ChatTokenizer
from ..api.openai_api import create_app
from ..api.protocol import DEFAULT_MAX_TOKENS
from ..api.serving_state import ServingState
from ..api.text_stream import TextDelta, stream_text
from ..client.client import Prompt
from ..config import EngineConfig
from .gang_backend import GangBackend
from .gang_directory import GangDirectory

if TYPE_CHECKING:
    from fastapi import FastAPI

# Serve asks for the application by calling a function without arguments, after the replica's constructor; a replica
# has its process to itself, so the constructor leaves its state here.
_state: ServingState | None = None
_api_key: str | None = None


def build_asgi_app() -> FastAPI:
    """Return this replica's application."""
    return create_app(_state, api_key=_api_key)


class Ingress:
    """Serves HTTP through ``build_asgi_app`` and Python callers through ``stream``."""

    async def __init__(self, gang: Any, config: EngineConfig) -> None:  # type: ignore[misc]
        global _state, _api_key
        from ray import serve

        tokenizer = ChatTokenizer(config.tokenizer_source, config.revision)
        directory = GangDirectory(serve.get_replica_context().app_name)
        self._backend = GangBackend(
            lambda: gang.coordinator.remote(), lambda: asyncio.to_thread(directory.coordinators)
        )
        await self._backend.attached()
        _api_key = config.api_key
        self._state = _state = await ServingState.create(self._backend, tokenizer, config.model_names, config.model)

    async def stream(self, prompt: Prompt, params: dict[str, Any]) -> AsyncGenerator[TextDelta, None]:
        """Generate one output piece by piece; ``params`` are fields of `SamplingParams`.

        Raises ``ValueError`` naming the field, ``EngineDeadError``, ``QueueFullError``, ``RequestTimeoutError``.
        """
        tokenizer = self._state.tokenizer
        sampling = SamplingParams.from_kwargs(**params)
        is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        if is_chat:
            token_ids = await asyncio.to_thread(tokenizer.encode_chat, prompt)  # type: ignore[arg-type]
        elif isinstance(prompt, str):
            token_ids = await asyncio.to_thread(tokenizer.encode, prompt)
        else:
            token_ids = list(prompt)  # type: ignore[arg-type]
        if sampling.max_tokens is None and not is_chat:
            room = max(1, self._state.max_model_len - len(token_ids))
            sampling = replace(sampling, max_tokens=min(DEFAULT_MAX_TOKENS, room))
        deltas = stream_text(self._backend, tokenizer, f"handle-{uuid.uuid4().hex}", token_ids, sampling)
        async with aclosing(deltas):
            async for delta in deltas:
                yield delta

    async def stats(self) -> dict[str, float]:
        """Return the engines' metrics by name, all gangs together."""
        from ..api.metrics import engine_samples

        return engine_samples(await self._backend.stats())

    async def models(self) -> list[str]:
        """Return the names of the models served."""
        return list(self._state.model_names)

    async def check_health(self) -> None:
        """Called by Serve: an ingress without a gang is well, and waits for one."""
