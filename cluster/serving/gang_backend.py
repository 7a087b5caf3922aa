"""All gangs of an application as one `Backend`: each request goes to the gang with the shortest queue."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from ...workers.model_info import RankInfo
from ...workers.sampling_params import SamplingParams
from ..engine.backend import EngineDeadError
from ..engine.events import RECOVERY, RESUBMISSION, Event
from ..engine.output import EngineStats, RequestOutput
from ..engine.output_router import OutputRouter
from ..speculation.options import AUTO, SpeculationOptions
from ..transport.live_requests import LiveRequests
from .gang_link import GangLink

logger = logging.getLogger(__name__)
_LOOK_S = 0.5
"""Between two looks for gangs that have come."""
_NO_GANG = "no gang is serving at present; send the request again"
_STATS_S = 5.0
"""Longest wait for a gang's totals: one that hangs must not hide the others'."""


class GangBackend:
    """Attaches to every coordinator that ``find`` returns by gang, and leaves those that drain or die.

    Requests that were live when theirs dies go on at another, or at the next that comes (`LiveRequests`); if there is
    none in ``timeout_s``, they end with ``EngineDeadError``. Create it on the event loop that will use it. One ingress
    knows every queue, since all requests go through it; of several, each evens out its own.
    """

    def __init__(self, find: Callable[[], Awaitable[Mapping[str, Any]]], timeout_s: float) -> None:
        self._find = find
        self._router = OutputRouter()
        self._live = LiveRequests(self._router, timeout_s)
        self._ties: dict[str, asyncio.Task[None]] = {}
        self._open: list[GangLink] = []
        """Those that are attached."""
        self._lost_s: float | None = None
        """When the last coordinator was lost, until another one has its requests."""
        self._attached = asyncio.Event()
        self._looking = asyncio.create_task(self._look())

    async def attached(self) -> None:
        """Wait for a gang."""
        await self._attached.wait()

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
            lambda: self._live.submit(request_id, prompt_token_ids, sampling, speculation, client),
            lambda reason: self._live.abort(request_id, reason),
        )

    def stopped(self, request_id: str) -> None:
        """Say that the reader found its stop string."""
        self._router.stopped(request_id)

    def count_unknown_fields(self, endpoint: str, num_fields: int) -> None:
        """Add to a gang's totals what only a server sees; nobody waits for it."""
        if self._open:
            self._open[0].coordinator.count_unknown_fields.remote(endpoint, num_fields)

    async def stats(self) -> dict[str, EngineStats]:
        """Return the totals of every gang that answers, by its name."""
        return await self._ask_all("stats")

    async def events(self) -> dict[str, list[Event]]:
        """Return the faults and recoveries of every gang that answers, by its name."""
        return await self._ask_all("events")

    async def _ask_all(self, method: str) -> dict[str, Any]:
        coordinators = await self._find()
        asked = [
            asyncio.wait_for(getattr(coordinator, method).remote(), _STATS_S) for coordinator in coordinators.values()
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return {
            name: answer
            for name, answer in zip(coordinators, answers, strict=True)
            if not isinstance(answer, BaseException)
        }

    async def ranks(self) -> list[RankInfo]:
        """Return what every rank of a gang loaded; all gangs load the same."""
        if not self._open:
            raise EngineDeadError(_NO_GANG)
        return await self._open[0].call("ranks")

    async def check_health(self) -> None:
        """Raise ``EngineDeadError`` if no gang can serve."""
        answers = await asyncio.gather(*[link.call("check_health") for link in self._open], return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if len(failures) == len(answers):
            raise failures[0] if failures else EngineDeadError(_NO_GANG)

    async def close(self) -> None:
        """Leave all gangs; requests that are live end with ``EngineDeadError``."""
        self._router.fail_all("the server is stopping; send the request again")
        self._looking.cancel()
        for tie in self._ties.values():
            tie.cancel()
        await asyncio.gather(self._looking, *self._ties.values(), return_exceptions=True)

    async def _look(self) -> None:
        """Attach to gangs as they come; one that is still loading, or that drains, refuses and is asked again."""
        while True:
            try:
                found = await self._find()
            except Exception as error:  # Ray raises many types; the gangs that are attached serve on
                logger.warning("cannot look for gangs: %s", error)
                found = {}
            for name in found.keys() - self._ties.keys():
                self._ties[name] = asyncio.create_task(self._tie(name, found[name]))
            await asyncio.sleep(_LOOK_S)

    async def _tie(self, name: str, coordinator: Any) -> None:
        """Be attached to a gang until it is lost or drained."""
        link = GangLink(coordinator, self._live)

        def opened(num_resumed: int) -> None:
            logger.info("attached to gang %s", name)
            self._open.append(link)
            self._attached.set()
            self._resumed(link, num_resumed)

        def lost(num_moved: int) -> None:
            self._open.remove(link)
            self._lost_s = time.monotonic()
            if self._open:
                self._resumed(self._open[0], num_moved)

        try:
            await link.run(opened, lost)
            logger.info("gang %s is drained", name)
        except Exception as error:  # Ray raises many types; whichever it is, this gang is over
            logger.log(logging.WARNING if self._attached.is_set() else logging.DEBUG, "gang %s: %s", name, error)
        finally:
            del self._ties[name]

    def _resumed(self, link: GangLink, num_requests: int) -> None:
        """Record that requests of a lost coordinator go on at another."""
        if self._lost_s is None or not num_requests:
            return
        gap_s, self._lost_s = time.monotonic() - self._lost_s, None
        message = f"an ingress goes on at another coordinator with {num_requests} requests"
        event = Event(RECOVERY, RESUBMISSION, message, duration_s=gap_s, num_requests_replayed=num_requests)
        link.coordinator.record.remote(event)
