"""The Ray actor that drafts, plans and commits: the engine loop of one gang, and the streams out of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from ...workers.model_info import RankInfo
from ...workers.sampling_params import SamplingParams
from ..config import EngineConfig
from ..engine.backend import EngineDeadError
from ..engine.engine import Engine
from ..engine.engine_thread import EngineThread
from ..engine.mailbox import Mailbox
from ..engine.output import ABORT, EngineStats, RequestOutput
from ..speculation.options import SpeculationOptions
from ..transport.remote_ranks import RemoteRanks
from ..transport.step_plane import LOOPBACK
from .load_summary import load_summary

logger = logging.getLogger(__name__)
RENEW_S = 2.0
LEASE_S = 10.0


class Coordinator:
    """Owns the engine of one gang. Methods run on the actor's event loop, the engine in its own thread.

    ``workers``: actor handles of `Worker`, in rank order; ``nodes``: their machines' addresses.
    """

    def __init__(self, config: EngineConfig, workers: Sequence[Any], nodes: Sequence[str]) -> None:
        # The process is the actor's own: its log has what we say, and the warnings of others
        logging.basicConfig()
        logging.getLogger(__name__.split(".")[0]).setLevel(logging.INFO)
        self._config, self._workers = config, list(workers)
        host = ray.util.get_node_ip_address()
        if set(nodes) == {host}:  # one machine: nothing need be heard outside it
            host, nodes = LOOPBACK, [LOOPBACK] * len(nodes)
        self._ranks = RemoteRanks(config, host, list(nodes), self._check_workers)
        self._runs: list[ray.ObjectRef] = []
        self._loaded: list[RankInfo] = []
        self._thread: EngineThread | None = None
        self._loop = asyncio.get_event_loop()
        self._readers: dict[str, Mailbox] = {}
        self._reader_of: dict[str, str] = {}
        self._heard_s: dict[str, float] = {}

    async def load(self) -> None:
        """Load every rank and start the engine; raises ``ValueError`` for what the user can mend."""
        self._runs = [
            worker.run.remote(settings) for worker, settings in zip(self._workers, self._ranks.settings, strict=True)
        ]
        await asyncio.to_thread(self._ranks.wait_loaded, self._loaded.append)
        logger.info("loaded\n%s", load_summary(self._ranks.infos, self._config.block_size))
        self._thread = EngineThread(Engine(self._config, self._ranks), self._deliver)
        self._leases = asyncio.create_task(self._end_leases())

    async def progress(self) -> tuple[int, int]:
        """Return how many ranks have loaded, of how many."""
        return len(self._loaded), len(self._workers)

    async def attach(self, reader_id: str) -> AsyncIterator[list[RequestOutput]]:
        """Stream the outputs of the requests that ``reader_id`` submits, one list a step, the first one empty.

        A reader that lags gets several steps in one.
        """
        mailbox = self._readers[reader_id] = Mailbox()
        self._heard_s[reader_id] = self._loop.time()
        try:
            yield []
            while reader_id in self._readers:
                yield await mailbox.take()
        finally:
            await self._detach(reader_id)

    async def renew(self, reader_id: str) -> None:
        """Say that ``reader_id`` is alive. Ray does not tell us when one dies, so each has a lease of ``LEASE_S``."""
        if reader_id not in self._readers:
            raise EngineDeadError("this reader is not attached")
        self._heard_s[reader_id] = self._loop.time()

    async def _end_leases(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            silent_since = self._loop.time() - LEASE_S
            for reader_id in [reader for reader, heard in self._heard_s.items() if heard < silent_since]:
                await self._detach(reader_id)

    async def _detach(self, reader_id: str) -> None:
        """Forget a reader and abort its requests."""
        self._heard_s.pop(reader_id, None)
        if (mailbox := self._readers.pop(reader_id, None)) is not None:
            mailbox.wake()  # its stream then ends
        for request_id in [r for r, reader in self._reader_of.items() if reader == reader_id]:
            await self.abort(request_id)

    async def submit(
        self,
        reader_id: str,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        speculation: SpeculationOptions,
    ) -> None:
        """Queue a request; raises ``ValueError`` naming the field, ``QueueFullError`` or ``EngineDeadError``."""
        if reader_id not in self._readers:
            raise EngineDeadError("this reader is not attached; send the request again")
        if request_id in self._reader_of:
            raise ValueError(f"request_id: {request_id!r} is in use")
        self._running().submit(request_id, prompt_token_ids, sampling, speculation)
        self._reader_of[request_id] = reader_id

    async def abort(self, request_id: str, reason: str = ABORT) -> None:
        """Drop a request; unknown or finished ones are ignored. ``reason``: see ``Engine.abort``."""
        if self._reader_of.pop(request_id, None) is not None:
            self._running().abort(request_id, reason)

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
        self._loop.call_soon_threadsafe(self._route, outputs)

    def _route(self, outputs: list[RequestOutput]) -> None:
        by_reader: dict[str, list[RequestOutput]] = {}
        for output in outputs:
            reader_id = self._reader_of.get(output.request_id)
            if reader_id is None:
                continue
            by_reader.setdefault(reader_id, []).append(output)
            if output.finish_reason is not None:
                del self._reader_of[output.request_id]
        for reader_id, batch in by_reader.items():
            if reader_id in self._readers:
                self._readers[reader_id].put(batch)
