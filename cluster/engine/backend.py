"""What a server needs of an engine, wherever the engine runs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol

from ...workers.model_info import RankInfo
from ...workers.sampling_params import SamplingParams
from ..speculation.options import AUTO, SpeculationOptions
from .events import Event
from .output import EngineStats, RequestOutput


class EngineDeadError(RuntimeError):
    """The engine cannot serve any more; its message says why."""


class QueueFullError(RuntimeError):
    """As many requests wait as may; this one was refused and nothing of it is kept."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s)  # both, so that it can be pickled
        self.retry_after_s = retry_after_s
        """When the requests that wait now will have left the queue, by the pace of late; at least 1."""

    def __str__(self) -> str:
        return str(self.args[0])


class RequestTimeoutError(TimeoutError):
    """The request took longer than ``request_timeout_s`` and was dropped."""


class Backend(Protocol):
    """An engine seen from asyncio: in this process (`AsyncEngine`) or behind a Ray actor (`GangBackend`)."""

    def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        speculation: SpeculationOptions = AUTO,
        client: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the request's outputs until one carries a ``finish_reason``.

        ``client``: whose request it is; clients share what is served.
        Closing the iterator early (client gone, stop string found) aborts the request and frees its blocks. A reader
        that lags gets several steps' tokens in one output.
        Raises ``ValueError`` naming the field if the prompt is empty, holds an id outside the vocabulary or, with
        ``max_tokens``, exceeds ``max_model_len``, or if the prediction is too long or holds such an id;
        ``QueueFullError``, ``RequestTimeoutError``, and ``EngineDeadError`` if the engine died.
        """
        ...

    def stopped(self, request_id: str) -> None:
        """Say that the reader found its stop string: closing the iterator then ends the request as ``stop``."""
        ...

    def count_unknown_fields(self, endpoint: str, num_fields: int) -> None:
        """Add to the totals what only a server sees, so that every server reports the counts of all."""
        ...

    async def stats(self) -> Mapping[str, EngineStats]:
        """Return the totals of every engine that answers, by its name: of all gangs, not of one that was asked."""
        ...

    async def events(self) -> Mapping[str, list[Event]]:
        """Return the faults and recoveries of every engine that answers, by its name, oldest first."""
        ...

    async def ranks(self) -> list[RankInfo]:
        """Return what every rank loaded."""
        ...

    async def check_health(self) -> None:
        """Raise ``EngineDeadError`` if the engine cannot serve."""
        ...
