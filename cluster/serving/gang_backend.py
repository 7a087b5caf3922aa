"""All gangs of an application as one `Backend`: each request goes to the gang with the shortest queue."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from ...workers.model_info import RankInfo
from ...workers.sampling_params import SamplingParams
from ..engine.backend import EngineDeadError
from ..engine.output import EngineStats, RequestOutput
from ..speculation.options import AUTO, SpeculationOptions
from .gang_link import GangLink

logger = logging.getLogger(__name__)
_LOOK_S = 0.5
"""Between two looks for gangs that have come."""
_NO_GANG = "no gang is serving at present; send the request again"
_STATS_S = 5.0
"""Longest wait for a gang's totals: one that hangs must not hide the others'."""


class GangBackend:
    """Attaches to every coordinator that ``find`` returns by gang, and leaves those that drain or die.

    Requests that were live when their gang dies end with ``EngineDeadError``. Create it on the event loop that will use
    it. One ingress knows every queue, since all requests go through it; of several, each evens out its own.
    """

    def __init__(self, find: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
        self._find = find
        self._ties: dict[str, asyncio.Task[None]] = {}
        self._open: list[GangLink] = []
        """Those that take requests, the one that got the last request at the end."""
        self._link_of: dict[str, GangLink] = {}
        self._attached = asyncio.Event()
        self._looking = asyncio.create_task(self._look())

    async def attached(self) -> None:
        """Wait for a gang."""
        await self._attached.wait()

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        speculation: SpeculationOptions = AUTO,
        client: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield a request's outputs; see ``Backend.generate``."""
        if request_id in self._link_of:
            raise ValueError(f"request_id: {request_id!r} is in use")
        link = self._shortest()
        self._link_of[request_id] = link
        try:
            with link.holding():
                async with aclosing(link.read(request_id, prompt_token_ids, sampling, speculation, client)) as outputs:
                    async for output in outputs:
                        yield output
        finally:
            del self._link_of[request_id]

    def _shortest(self) -> GangLink:
        """Return the gang with the fewest live requests, of equals the one that has waited longest for another."""
        link = min((link for link in self._open if link.open), key=lambda link: link.num_live, default=None)
        if link is None:
            raise EngineDeadError(_NO_GANG)
        self._open.remove(link)
        self._open.append(link)
        return link

    def stopped(self, request_id: str) -> None:
        """Say that the reader found its stop string."""
        if request_id in self._link_of:
            self._link_of[request_id].stopped(request_id)

    def count_unknown_fields(self, endpoint: str, num_fields: int) -> None:
        """Add to a gang's totals what only a server sees; nobody waits for it."""
        if self._open:
            self._open[0].coordinator.count_unknown_fields.remote(endpoint, num_fields)

    async def stats(self) -> dict[str, EngineStats]:
        """Return the totals of every gang that answers, by its name."""
        coordinators = await self._find()
        asked = [asyncio.wait_for(coordinator.stats.remote(), _STATS_S) for coordinator in coordinators.values()]
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
        link = GangLink(coordinator)

        def opened() -> None:
            logger.info("attached to gang %s", name)
            self._open.append(link)
            self._attached.set()

        try:
            await link.run(opened)
            logger.info("gang %s is drained", name)
        except Exception as error:  # Ray raises many types; whichever it is, this gang is over
            logger.log(logging.WARNING if link in self._open else logging.DEBUG, "gang %s: %s", name, error)
        finally:
            if link in self._open:
                self._open.remove(link)
            del self._ties[name]
