"""The Ray actor that drafts, plans and commits: the engine loop of one gang, and the streams out of it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Sequence

import ray

from ...router.placement import Placement
from ...workers.model_info import RankInfo
from ..config import EngineConfig
from ..engine.backend import EngineDeadError
from ..engine.budget import EngineBudget
from ..engine.engine import Engine
from ..engine.engine_thread import EngineThread
from ..engine.events import Event, EventLog
from ..engine.output import EngineStats, RequestOutput
from ..transport.curve import LOOPBACK, Ticket
from ..transport.remote_ranks import RemoteRanks
from ..transport.request_server import RequestServer
from .attachments import Attachments
from .load_summary import load_summary, rank_summary
from .news import News, Newsletter
from .worker import PlacedWorker, Whereabouts
from .worker_pool import WorkerPool

logger = logging.getLogger(__name__)


class Coordinator:
    """Owns the engine of one gang. Methods run on the actor's event loop, the engine in its own thread.

    ``workers``: in the order of the ranks that they are to be, then spares. With ``adopt`` they have served another
    coordinator of this gang, which has died, and keep what they have loaded. ``events``: the gang's so far.
    ``placement``: what the file that ``config`` names holds; ``budgets``: what is known of its budgets.
    """

    def __init__(
        self,
        config: EngineConfig,
        workers: Sequence[PlacedWorker],
        placement: Placement | None,
        budgets: Sequence[EngineBudget],
        *,
        adopt: bool = False,
        events: Sequence[Event] = (),
    ) -> None:
        # The process is the actor's own: its log has what we say, and the warnings of others
        logging.basicConfig()
        logging.getLogger(__name__.split(".")[0]).setLevel(logging.INFO)
        self._config, self._placement, self._budgets = config, placement, budgets
        self._workers, self._adopt = workers, adopt
        self._earlier = events
        self._num_loaded = 0
        self._thread: EngineThread | None = None
        self._ranks: RemoteRanks | None = None
        self._engine: Engine | None = None
        self._attachments: Attachments | None = None
        self._pool: WorkerPool | None = None
        self._newsletter = Newsletter()

    async def load(self) -> None:
        """Load every rank and start the engine; raises ``ValueError`` for what the user can mend."""
        self._loop = loop = asyncio.get_running_loop()
        events = EventLog(self._earlier, lambda event: loop.call_soon_threadsafe(self._newsletter.event, event))
        node = ray.util.get_node_ip_address()
        self._pool = WorkerPool(self._workers, node, self._newsletter.vacancy, self._look_after)
        # On one machine nothing need be heard outside it; a worker that is yet to come may come elsewhere
        is_complete = len(self._workers) == self._config.expert_parallel_size + self._config.num_spares
        is_alone = is_complete and {worker.where.node for worker in self._workers} == {node}
        host = LOOPBACK if is_alone else node
        self._ranks = RemoteRanks(
            self._config,
            host,
            self._pool.launch,
            self._placement,
            node=LOOPBACK if is_alone else "",
            events=events,
        )
        await asyncio.to_thread(
            self._ranks.start, self._count_loaded, num_adopted=len(self._workers) if self._adopt else 0
        )
        summary = load_summary(self._ranks.infos, self._config.block_size)
        logger.info("loaded\n%s\n%s", summary, rank_summary(await self.nodes()))
        self._engine = Engine(self._config, self._ranks, budgets=self._budgets, events=events)
        if not self._adopt:  # those that wait for the coordinator that was lost wait no longer than they must
            await asyncio.to_thread(self._engine.warm_up)
        self._thread = EngineThread(self._engine, self._deliver, overlap=True, tend=self._tend)
        self._ranks.meanwhile = self._thread.meanwhile
        self._requests = RequestServer(host, self._thread)
        self._attachments = Attachments(self._requests)

    def _count_loaded(self, _: RankInfo) -> None:
        self._num_loaded += 1

    async def progress(self) -> tuple[int, int]:
        """Return how many ranks have loaded, of how many."""
        return self._num_loaded, self._config.expert_parallel_size

    async def where(self) -> Whereabouts:
        """Return where this is."""
        return Whereabouts(ray.util.get_node_ip_address(), os.getpid())

    async def record(self, event: Event) -> None:
        """Take note of what the gang or an ingress saw."""
        assert self._ranks is not None, "it has loaded"
        self._ranks.events.record(event)

    async def news(self) -> News:
        """Wait for what the gang must know: workers that are lost, and events."""
        return await self._newsletter.next()

    async def add_worker(self, worker: PlacedWorker) -> None:
        """Take the worker that the gang has put in a lost one's place."""
        assert self._pool is not None, "there was a vacancy"
        self._pool.add(worker)

    def _look_after(self) -> None:
        """Have the engine mend its ranks between steps; if one runs, that notices by itself."""
        if self._thread is not None:
            self._thread.look_after()

    def _tend(self) -> None:
        assert self._ranks is not None
        assert self._engine is not None
        if self._ranks.tend(ping=not self._engine.has_requests):
            self._engine.recover()

    async def attach(self, reader_id: str) -> AsyncIterator[Ticket | str]:
        """Yield what ``reader_id`` connects to the request plane with, then `DRAINING` if the gang is to stop.

        The stream ends when the reader is forgotten. So whoever reads on learns that, and from Ray that this
        coordinator has died.
        """
        self._running().check_health()
        assert self._attachments is not None, "the engine runs"
        async for item in self._attachments.attach(reader_id):
            yield item

    async def detach(self, reader_id: str) -> None:
        """Forget a reader and abort its requests."""
        if self._attachments is not None:
            self._attachments.detach(reader_id)

    async def drain(self) -> None:
        """Take no more requests; return when those that there are have ended."""
        if self._attachments is not None:
            await self._attachments.drain()

    async def nodes(self) -> list[str]:
        """Return the address of every rank's machine, as they were placed first."""
        return [worker.where.node for worker in self._workers[: self._config.expert_parallel_size]]

    async def count_unknown_fields(self, endpoint: str, num_fields: int) -> None:
        """Add to the engine's totals what only an ingress sees."""
        self._running().count_unknown_fields(endpoint, num_fields)

    async def stats(self) -> EngineStats:
        """Return the engine's totals; raises ``EngineDeadError``."""
        return self._running().stats()

    async def ranks(self) -> list[RankInfo]:
        """Return what every rank loaded."""
        return self._running().infos

    async def check_health(self) -> None:
        """Raise ``EngineDeadError`` if the engine gave up; lost ranks that it replaces are no reason."""
        self._running().check_health()

    async def events(self) -> list[Event]:
        """Return the faults and recoveries of this gang that are remembered, oldest first."""
        return self._running().events()

    def _running(self) -> EngineThread:
        if self._thread is None:
            raise EngineDeadError("the engine has not loaded yet")
        return self._thread

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        assert self._requests is not None, "it stands before the first request"
        self._loop.call_soon_threadsafe(self._requests.deliver, outputs)
