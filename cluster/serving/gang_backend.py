"""A gang as a `Backend`: one socket to its coordinator, shared by all requests; Ray tells where, and of its death."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from ...workers.model_info import RankInfo
from ...workers.sampling_params import SamplingParams
from ..engine.backend import EngineDeadError, QueueFullError
from ..engine.events import RECOVERY, RESUBMISSION, Event
from ..engine.output import EngineStats, RequestOutput
from ..engine.output_router import OutputRouter
from ..speculation.options import AUTO, SpeculationOptions
from ..transport.live_requests import LiveRequests
from ..transport.request_client import RequestClient

logger = logging.getLogger(__name__)
_RETRY_S = 0.5
_NO_GANG = "no gang is serving at present; send the request again"
_STATS_S = 5.0
"""Longest wait for a gang's totals: one that hangs must not hide the others'."""


class GangBackend:
    """Attaches to the coordinator that ``find`` returns; asks again when that coordinator dies.

    ``find_all`` returns the coordinators of all gangs by name. Requests that were live when theirs dies go on at the
    next one (`LiveRequests`); if there is none in ``timeout_s``, they end with ``EngineDeadError``. Create it on the
    event loop that will use it.
    """

    def __init__(
        self,
        find: Callable[[], Awaitable[Any]],
        find_all: Callable[[], Awaitable[Mapping[str, Any]]],
        timeout_s: float,
    ) -> None:
        self._find, self._find_all = find, find_all
        self._router = OutputRouter()
        self._live = LiveRequests(self._router, timeout_s, self._lose)
        self._coordinator: Any = None
        self._client: RequestClient | None = None
        self._reader_id: str | None = None
        self._lost_s: float | None = None
        """When the last coordinator was lost, until there is another."""
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
        return self._router.read(
            request_id,
            lambda: self._live.submit(request_id, prompt_token_ids, sampling, speculation),
            lambda reason: self._live.abort(request_id, reason),
        )

    def stopped(self, request_id: str) -> None:
        """Say that the reader found its stop string."""
        self._router.stopped(request_id)

    def count_unknown_fields(self, endpoint: str, num_fields: int) -> None:
        """Add to this gang's totals what only a server sees; nobody waits for it."""
        if self._coordinator is not None:
            self._coordinator.count_unknown_fields.remote(endpoint, num_fields)

    async def stats(self) -> dict[str, EngineStats]:
        """Return the totals of every gang that answers, by its name."""
        return await self._ask_all("stats")

    async def events(self) -> dict[str, list[Event]]:
        """Return the faults and recoveries of every gang that answers, by its name."""
        return await self._ask_all("events")

    async def _ask_all(self, method: str) -> dict[str, Any]:
        coordinators = await self._find_all()
        asked = [asyncio.wait_for(_call(coordinator, method), _STATS_S) for coordinator in coordinators.values()]
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

    def _lose(self, why: str) -> None:
        if self._client is not None:
            self._client.lose(why)

    async def _run(self) -> None:
        while True:
            try:
                await self._serve(await self._find())
            except Exception as error:  # Ray raises many types; whichever it is, this gang is over
                logger.warning("lost the gang: %s", error)
                if self._attached.is_set():
                    self._lost_s = time.monotonic()
                self._coordinator = self._client = None
                self._attached.clear()
                self._live.detached()
                await asyncio.sleep(_RETRY_S)

    async def _serve(self, coordinator: Any) -> None:
        """Be attached to ``coordinator`` until it is lost, which raises."""
        # A new name each time: the coordinator may still be forgetting the last one
        replaced, self._reader_id = self._reader_id, uuid.uuid4().hex
        attachment = coordinator.attach.options(num_returns="streaming").remote(self._reader_id, replaced)
        client = RequestClient(await (await anext(attachment)), self._live)
        # Ray tells of the coordinator's death at once, the lease of what Ray does not see
        watches = [asyncio.create_task(_end_of(attachment)), asyncio.create_task(client.run())]
        try:
            await client.connected()
            self._coordinator, self._client = coordinator, client
            self._resubmitted(self._live.attached(client))
            self._attached.set()
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            done.pop().result()
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
            client.close()

    def _resubmitted(self, num_requests: int) -> None:
        if self._lost_s is None:
            return
        gap_s, self._lost_s = time.monotonic() - self._lost_s, None
        message = f"an ingress goes on at another coordinator with {num_requests} requests"
        event = Event(RECOVERY, RESUBMISSION, message, duration_s=gap_s, num_requests_replayed=num_requests)
        self._coordinator.record.remote(event)


async def _end_of(attachment: Any) -> None:
    """Raise when the stream ends, and say that it did if Ray knows no reason."""
    async for item in attachment:
        await item  # a death comes as an item
    raise EngineDeadError("the coordinator has forgotten this ingress")


async def _call(coordinator: Any, method: str, *args: Any) -> Any:
    """Call the coordinator and raise its own errors instead of Ray's wrappings."""
    if coordinator is None:
        raise EngineDeadError(_NO_GANG)
    try:
        return await getattr(coordinator, method).remote(*args)
    except RayTaskError as error:
        if isinstance(error.cause, ValueError | EngineDeadError | QueueFullError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise EngineDeadError("the coordinator is gone; send the request again") from error
