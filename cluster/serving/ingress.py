"""The Serve deployment in front: OpenAI protocol and tokenisation over a gang somewhere in the cluster."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ..api.admission import Admission
from ..api.chat_tokenizer import ChatTokenizer
from ..api.openai_api import create_app
from ..api.serving_state import ServingState
from ..api.text_stream import TextDelta
from ..client.client import Prompt
from ..client.prompt_stream import stream_prompt
from ..config import EngineConfig
from .gang_backend import GangBackend
from .gang_directory import GangDirectory
from .http_server import Address, listen

if TYPE_CHECKING:
    from fastapi import FastAPI

# Serve asks for the application by calling a function without arguments, after the replica's constructor; a replica
# has its process to itself, so the constructor leaves its state here.
_state: ServingState | None = None
_api_key: str | None = None
_admission: Admission | None = None


def build_asgi_app() -> FastAPI:
    """Return this replica's application."""
    return create_app(_state, api_key=_api_key, admission=_admission)


class Ingress:
    """Serves HTTP and, through ``stream``, Python callers.

    With an ``address`` it listens there itself; Serve's own proxy, where there is one, gets to ``build_asgi_app``.
    ``gang`` makes the gangs part of the application; requests go to their coordinators past Serve.
    """

    _backend: GangBackend | None = None

    async def __init__(  # type: ignore[misc]
        self, gang: Any, config: EngineConfig, address: Address | None = None
    ) -> None:
        global _state, _api_key, _admission
        from ray import serve

        tokenizer = ChatTokenizer(config.tokenizer_source, config.revision)
        directory = GangDirectory(serve.get_replica_context().app_name)
        self._backend = backend = GangBackend(
            lambda: asyncio.to_thread(directory.coordinators), config.recovery_timeout_s
        )
        await backend.attached()
        _api_key = config.api_key
        self._admission = _admission = Admission()
        self._state = _state = await ServingState.create(
            backend, tokenizer, config.model_names, config.model, config.budgets, config.max_body_bytes
        )
        # what is loaded stays: looking through it anew would take most of the time of parsing a large body
        gc.collect()
        gc.freeze()
        if address is not None:
            self._http = await listen(build_asgi_app(), address)

    async def stream(self, prompt: Prompt, params: dict[str, Any]) -> AsyncGenerator[TextDelta, None]:
        """Generate one output piece by piece; ``params`` are those of `RequestParams`.

        Raises ``ValueError`` naming the field, ``EngineDeadError``, ``QueueFullError``, ``RequestTimeoutError``.
        """
        state = self._state
        with self._admission.admitted():
            deltas = stream_prompt(state.backend, state.tokenizer, state.max_model_len, prompt, params)
            async with aclosing(deltas):
                async for delta in deltas:
                    yield delta

    async def drain(self, timeout_s: float) -> int:
        """Refuse what comes from now on; return how many requests are left when all have ended or time is up."""
        return await self._admission.close(timeout_s)

    async def stats(self) -> dict[str, float]:
        """Return the engines' metrics by name, all gangs together."""
        from ..api.metrics import engine_samples

        return engine_samples(await self._state.backend.stats())

    async def models(self) -> list[str]:
        """Return the names of the models served."""
        return list(self._state.model_names)

    async def check_health(self) -> None:
        """Called by Serve: an ingress without a gang is well, and waits for one."""

    async def __del__(self) -> None:
        """Called by Serve before it stops this ingress: gangs need not wait to find that it has gone."""
        if self._backend is not None:
            await self._backend.close()
