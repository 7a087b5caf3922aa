"""A gang as a `Backend`: one stream of outputs from its coordinator, shared by all requests."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError

from ...workers.model_info import RankInfo
from ...workers.sampling_params import SamplingParams
from ..engine.backend import EngineDeadError, QueueFullError
from ..engine.output import EngineStats, RequestOutput
from ..engine.output_router import OutputRouter
from ..speculation.options import AUTO, SpeculationOptions
from .coordinator import RENEW_S

logger = logging.getLogger(__name__)
_RETRY_S = 0.5
_MAX_BATCHES = 64
"""Batches on their way at most: while this process lags further, the coordinator merges steps instead."""
_STATS_S = 5.0
"""Longest wait for a gang's totals: one that hangs must not hide the others'."""


class GangBackend:
    """Streams from the coordinator that ``find`` returns; asks again when that coordinator dies.

    ``find_all`` returns the coordinators of all gangs by name. Requests that were live when theirs dies end with
    ``EngineDeadError``. Create it on the event loop that will use it.
    """

    def __init__(
        self, find: Callable[[], Awaitable[Any]], find_all: Callable[[], Awaitable[Mapping[str, Any]]]
    ) -> None:
        self._find, self._find_all = find, find_all
        self._router = OutputRouter()
        self._reader_id = ""
        self._coordinator: Any = None
        self._attached = asyncio.Event()
        self._pump = asyncio.create_task(self._run())

    async def attached(self) -> None:
        """Wait for a gang."""
        await self._attached.wait()

    def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        speculation: SpeculationOptions = AUTO,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield a request's outputs; see ``Backend.generate``."""
        coordinator, reader_id = self._coordinator, self._reader_id

        async def submit() -> None:
            await _call(coordinator, "submit", reader_id, request_id, list(prompt_token_ids), sampling, speculation)

        async def abort(reason: str) -> None:
            await _call(coordinator, "abort", request_id, reason)

        return self._router.read(request_id, submit, abort)

    def stopped(self, request_id: str) -> None:
        """Say that the reader found its stop string."""
        self._router.stopped(request_id)

    def count_unknown_fields(self, endpoint: str, num_fields: int) -> None:
        """Add to this gang's totals what only a server sees; nobody waits for it."""
        if self._coordinator is not None:
            self._coordinator.count_unknown_fields.remote(endpoint, num_fields)

    async def stats(self) -> dict[str, EngineStats]:
        """Return the totals of every gang that answers, by its name."""
        coordinators = await self._find_all()
        asked = [asyncio.wait_for(_call(coordinator, "stats"), _STATS_S) for coordinator in coordinators.values()]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return {
            name: answer
            for name, answer in zip(coordinators, answers, strict=True)
            if not isinstance(answer, BaseException)
        }

    async def ranks(self) -> list[RankInfo]:
        """Return what every rank loaded."""
        return await _call(self._coordinator, "ranks")

    async def check_health(self) -> None:
        """Raise ``EngineDeadError`` if the engine cannot serve."""
        await _call(self._coordinator, "check_health")

    async def _run(self) -> None:
        while True:
            renewal: asyncio.Task[None] | None = None
            try:
                coordinator = await self._find()
                # A new name each time: the coordinator may still be forgetting the last one
                self._reader_id = uuid.uuid4().hex
                attach = coordinator.attach.options(
                    num_returns="streaming", _generator_backpressure_num_objects=_MAX_BATCHES
                )
                async for batch in attach.remote(self._reader_id):
                    outputs = await batch
                    if not self._attached.is_set():
                        self._coordinator = coordinator
                        self._attached.set()
                        renewal = asyncio.create_task(self._renew(coordinator, self._reader_id))
                    self._router.deliver(outputs)
                raise EngineDeadError("the coordinator ended its stream")
            except Exception as error:  # Ray raises many types; whichever it is, this stream is over
                logger.warning("lost the gang: %s", error)
                self._coordinator = None
                self._attached.clear()
                self._router.fail_all("the gang that served this request is gone; send it again")
                await asyncio.sleep(_RETRY_S)
            finally:
                if renewal is not None:
                    renewal.cancel()

    @staticmethod
    async def _renew(coordinator: Any, reader_id: str) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            with suppress(RayError):  # a coordinator that is gone ends the stream too
                await coordinator.renew.remote(reader_id)


async def _call(coordinator: Any, method: str, *args: Any) -> Any:
    """Call the coordinator and raise its own errors instead of Ray's wrappings."""
    if coordinator is None:
        raise EngineDeadError("no gang is serving at present; send the request again")
    try:
        return await getattr(coordinator, method).remote(*args)
    except RayTaskError as error:
        if isinstance(error.cause, ValueError | EngineDeadError | QueueFullError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise EngineDeadError("the coordinator is gone; send the request again") from error
