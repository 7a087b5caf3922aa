"""The Ray actor that drafts, plans and commits: the engine loop of one gang, and the streams out of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from ...router.placement import Placement
from ...workers.model_info import RankInfo
from ..config import EngineConfig
from ..engine.backend import EngineDeadError
from ..engine.budget import EngineBudget
from ..engine.engine import Engine
from ..engine.engine_thread import EngineThread
from ..engine.output import EngineStats, RequestOutput
from ..transport.curve import LOOPBACK, Ticket
from ..transport.remote_ranks import RemoteRanks
from ..transport.request_server import RequestServer
from .attachments import Attachments
from .load_summary import load_summary, rank_summary

logger = logging.getLogger(__name__)


class Coordinator:
    """Owns the engine of one gang. Methods run on the actor's event loop, the engine in its own thread.

    ``workers``: actor handles of `Worker`, in rank order; ``nodes``: their machines' addresses; ``placement``: what the
    file that ``config`` names holds; ``budgets``: what is known of its budgets.
    """

    def __init__(
        self,
        config: EngineConfig,
        workers: Sequence[Any],
        nodes: Sequence[str],
        placement: Placement | None,
        budgets: Sequence[EngineBudget],
    ) -> None:
        # The process is the actor's own: its log has what we say, and the warnings of others
        logging.basicConfig()
        logging.getLogger(__name__.split(".")[0]).setLevel(logging.INFO)
        self._config, self._workers, self._nodes, self._budgets = config, list(workers), list(nodes), budgets
        host = ray.util.get_node_ip_address()
        if set(nodes) == {host}:  # one machine: nothing need be heard outside it
            host, nodes = LOOPBACK, [LOOPBACK] * len(nodes)
        self._host = host
        self._ranks = RemoteRanks(config, host, list(nodes), self._check_workers, placement)
        self._runs: list[ray.ObjectRef] = []
        self._loaded: list[RankInfo] = []
        self._thread: EngineThread | None = None
        self._loop = asyncio.get_event_loop()
        self._requests: RequestServer | None = None
        self._attachments: Attachments | None = None

    async def load(self) -> None:
        """Load every rank and start the engine; raises ``ValueError`` for what the user can mend."""
        self._runs = [
            worker.run.remote(settings) for worker, settings in zip(self._workers, self._ranks.settings, strict=True)
        ]
        await asyncio.to_thread(self._ranks.wait_loaded, self._loaded.append)
        summary = load_summary(self._ranks.infos, self._config.block_size)
        logger.info("loaded\n%s\n%s", summary, rank_summary(self._nodes))
        self._thread = EngineThread(
            Engine(self._config, self._ranks, budgets=self._budgets), self._deliver, overlap=True
        )
        self._ranks.meanwhile = self._thread.meanwhile
        self._requests = RequestServer(self._host, self._thread)
        self._attachments = Attachments(self._requests)

    async def progress(self) -> tuple[int, int]:
        """Return how many ranks have loaded, of how many."""
        return len(self._loaded), len(self._workers)

    async def attach(self, reader_id: str) -> AsyncIterator[Ticket | str]:
        """Yield what ``reader_id`` connects to the request plane with, then `DRAINING` if the gang is to stop.

        The stream ends when the reader is forgotten. So whoever reads on learns that, and from Ray that this
        coordinator has died.
        """
        if self._attachments is None:
            raise EngineDeadError("the engine has not loaded yet")
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
        """Return the address of every rank's machine."""
        return self._nodes

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
        """Raise ``EngineDeadError`` if the engine gave up or a worker is gone."""
        self._running().check_health()
        await asyncio.to_thread(self._check_workers)

    def _running(self) -> EngineThread:
        if self._thread is None:
            raise EngineDeadError("the engine has not loaded yet")
        return self._thread

    def _check_workers(self) -> None:
        """Raise if a rank's ``run`` has ended: it only does when told to, or when its process dies."""
        for rank, run in enumerate(self._runs):
            done, _ = ray.wait([run], timeout=0)
            if done:
                try:
                    ray.get(run)
                except RayError as error:
                    reason = (str(error).strip().splitlines() or [""])[0]
                    raise EngineDeadError(f"the worker of rank {rank} died: {type(error).__name__} {reason}") from error
                # A rank that refused its configuration has said why before it ended
                if self._ranks.infos:
                    raise EngineDeadError(f"the worker of rank {rank} ended")

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        assert self._requests is not None, "it stands before the first request"
        self._loop.call_soon_threadsafe(self._requests.deliver, outputs)
