"""What a server needs of an engine, wherever the engine runs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from ...workers.model_info import RankInfo
from ...workers.sampling_params import SamplingParams
from .output import EngineStats, RequestOutput


class EngineDeadError(RuntimeError):
    """The engine cannot serve any more; its message says why."""


class Backend(Protocol):
    """An engine seen from asyncio: in this process (`AsyncEngine`) or behind a Ray actor (`GangBackend`)."""

    def generate(
        self, request_id: str, prompt_token_ids: Sequence[int], sampling: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the request's outputs until one carries a ``finish_reason``.

        Closing the iterator early (client gone, stop string found) aborts the request and frees its blocks.
        Raises ``ValueError`` naming the field if the prompt is empty, holds an id outside the vocabulary or, with
        ``max_tokens``, exceeds ``max_model_len``; ``EngineDeadError`` if the engine died.
        """
        ...

    async def stats(self) -> EngineStats:
        """Return the engine's totals."""
        ...

    async def ranks(self) -> list[RankInfo]:
        """Return what every rank loaded."""
        ...

    async def check_health(self) -> None:
        """Raise ``EngineDeadError`` if the engine cannot serve."""
        ...
