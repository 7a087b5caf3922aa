"""The engine for asyncio, in this process. Behind Ray the same part is played by `GangBackend`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from ...workers.model_info import RankInfo
from ...workers.sampling_params import SamplingParams
from ..speculation.options import AUTO, SpeculationOptions
from .backend import EngineDeadError
from .engine import Engine
from .engine_thread import EngineThread
from .events import Event
from .output import EngineStats, RequestOutput
from .output_router import OutputRouter


class AsyncEngine:
    """A `Backend` over an engine in its own thread. Create it on the event loop that will use it."""

    def __init__(self, engine: Engine) -> None:
        self._loop = asyncio.get_running_loop()
        self._router = OutputRouter()
        self.thread = EngineThread(engine, self._deliver)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        # One wake-up a step, however many requests it served
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._router.deliver, outputs)

    def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        speculation: SpeculationOptions = AUTO,
        client: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield a request's outputs; see ``Backend.generate``."""

        return self._router.read(
            request_id,
            lambda: self.thread.submit(request_id, prompt_token_ids, sampling, speculation, client),
            lambda reason: self.thread.abort(request_id, reason),
        )

    def stopped(self, request_id: str) -> None:
        """Say that the reader found its stop string."""
        self._router.stopped(request_id)

    def count_unknown_fields(self, endpoint: str, num_fields: int) -> None:
        """Add to the engine's totals what only a server sees."""
        self.thread.count_unknown_fields(endpoint, num_fields)

    async def stats(self) -> dict[str, EngineStats]:
        """Return the totals of the only engine; none if it is dead."""
        try:
            return {"0": self.thread.stats()}
        except EngineDeadError:
            return {}

    async def events(self) -> dict[str, list[Event]]:
        """Return the faults and recoveries of the only engine."""
        return {"0": self.thread.events()}

    async def ranks(self) -> list[RankInfo]:
        """Return what every rank loaded."""
        return self.thread.infos

    async def check_health(self) -> None:
        """Raise ``EngineDeadError`` if the engine cannot serve."""
        self.thread.check_health()

    async def close(self) -> None:
        """Stop the engine; requests that still run get an error."""
        self._router.fail_all("the engine is closing")
        await asyncio.to_thread(self.thread.close)
        self._router.fail_all("the engine is closed")  # those that came before the thread knew
