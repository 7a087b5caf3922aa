"""The Serve deployment whose replica is one gang: a coordinator, the workers of all its ranks, and spares."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ...router.placement import Placement
from ..config import EngineConfig
from ..engine.backend import EngineDeadError
from ..engine.budget import EngineBudget
from ..engine.events import COORDINATOR_DIED, FAULT, RECOVERY, Event
from .autoscaling import QUEUE_DEPTH
from .coordinator import Coordinator
from .resources import (
    COORDINATOR_CPUS,
    COORDINATOR_NUMBER,
    COORDINATOR_PREFIX,
    FIRST_WORKER_BUNDLE,
    NAMESPACE,
    rank_order,
)
from .worker import PlacedWorker, Whereabouts, Worker

logger = logging.getLogger(__name__)
_WORKER_THREADS = 8
_RETRY_S = 0.5
_SILENT_S = 20.0
"""A coordinator whose event loop does not answer for so long is stopped or stuck."""
_NUM_EVENTS = 1024


class Gang:
    """Owns the actors of one gang, which die with it. Serve's constructor call returns when all ranks have loaded.

    It puts another worker in the place of one that is lost, and another coordinator in the place of one that dies: that
    adopts the workers with what they have loaded.
    """

    _coordinator: Any = None

    async def __init__(  # type: ignore[misc]
        self,
        config: EngineConfig,
        *,
        gpu: bool = False,
        placement: Placement | None = None,
        budgets: Sequence[EngineBudget] = (),
    ) -> None:
        from ray import serve

        self._config, self._gpu, self._placement, self._budgets = config, gpu, placement, budgets
        self._group = ray.util.get_current_placement_group()
        replica = serve.get_replica_context()
        self._name = f"{COORDINATOR_PREFIX}{replica.app_name}:{replica.replica_id.unique_id}"
        self._events: list[Event] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_coordinators = 0
        self._where: Whereabouts | None = None
        num_workers = config.expert_parallel_size + config.num_spares
        placed = await asyncio.gather(*[self._place(FIRST_WORKER_BUNDLE + i) for i in range(num_workers)])
        order = rank_order([worker.where.node for worker in placed])
        self._workers = {placed[i].bundle: placed[i] for i in order}
        self._mended_since: float | None = None
        """When the coordinator was found dead, until there is another."""
        self._failure: str | None = None
        self._forwarding = await self._start_coordinator(adopt=False)
        self._tasks = {asyncio.create_task(self._supervise()), asyncio.create_task(self._watch_silence())}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve where the number of gangs varies."""
        stats = await self._coordinator.stats.remote()
        return {QUEUE_DEPTH: stats.num_requests_running + stats.num_requests_waiting}

    async def check_health(self) -> None:
        """Called by Serve; a gang that cannot recover is replaced as a whole, one that may is left alone."""
        if self._failure is not None:
            raise EngineDeadError(self._failure)
        if self._mended_since is not None:
            return  # bounded by the time that another coordinator may take
        with suppress(RayActorError):  # then there will be another, or a failure
            await self._coordinator.check_health.remote()

    async def __del__(self) -> None:
        """Called by Serve, which waits for it, before it stops this gang: live requests end first."""
        if self._coordinator is not None:
            with suppress(RayError):  # a coordinator that is gone has none
                await self._coordinator.drain.remote()

    async def _place(self, bundle: int) -> PlacedWorker:
        actor: Any = (
            ray.remote(Worker)
            .options(
                max_concurrency=_WORKER_THREADS,
                num_cpus=self._config.cpus_per_rank,
                num_gpus=int(self._gpu),
                scheduling_strategy=_bundle(self._group, bundle),
            )
            .remote()
        )
        return PlacedWorker(bundle, actor, await actor.where.remote())

    async def _start_coordinator(self, *, adopt: bool) -> asyncio.Task[None]:
        """Start a coordinator; return what takes its news when it has loaded, and raises when it dies."""
        # Ray does not give the name of an actor that has died to another one
        name = f"{self._name}{COORDINATOR_NUMBER}{self._num_coordinators}"
        self._num_coordinators += 1
        actor: Any = ray.remote(Coordinator).options(
            max_concurrency=10_000,
            num_cpus=COORDINATOR_CPUS,
            name=name,
            namespace=NAMESPACE,
            scheduling_strategy=_bundle(self._group, 1),
        )
        workers = list(self._workers.values())
        coordinator = actor.remote(
            self._config, workers, self._placement, self._budgets, adopt=adopt, events=tuple(self._events)
        )
        # Already now: it may lose workers while it loads, and those that come then must reach it
        self._coordinator = coordinator
        self._where = None
        forwarding = asyncio.create_task(self._forward(coordinator))
        try:
            self._where = await coordinator.where.remote()
            await coordinator.load.remote()
        except BaseException:
            forwarding.cancel()
            raise
        return forwarding

    async def _forward(self, coordinator: Any) -> None:
        """Take a coordinator's news until it dies."""
        while True:
            news = await coordinator.news.remote()
            self._events = [*self._events, *news.events][-_NUM_EVENTS:]
            for bundle in news.vacancies:
                task = asyncio.create_task(self._replace(bundle))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _supervise(self) -> None:
        while self._failure is None:
            try:
                await self._forwarding
            except RayError as error:
                await self._mend(_first_line(error))

    async def _mend(self, reason: str) -> None:
        """Put another coordinator in the place of one that died; the workers keep what they have loaded."""
        died_s = self._mended_since = time.monotonic()
        self._events.append(Event(FAULT, COORDINATOR_DIED, f"the coordinator died: {reason}"))
        logger.warning("the coordinator died: %s", reason)
        try:
            async with asyncio.timeout(self._config.recovery_timeout_s):
                await self._restart()
        except Exception as error:  # Ray raises many types; whichever it is, this gang is over
            self._failure = f"there is no coordinator: {_first_line(error)}"
            logger.error("the gang is given up: %s", self._failure)
            return
        self._mended_since = None
        recovery = Event(
            RECOVERY,
            COORDINATOR_DIED,
            f"another coordinator has adopted {len(self._workers)} workers",
            duration_s=time.monotonic() - died_s,
        )
        with suppress(RayActorError):
            await self._coordinator.record.remote(recovery)

    async def _restart(self) -> None:
        while True:
            # What Ray takes for dead may be out of reach: it must not hold its place, or act, when it comes back
            ray.kill(self._coordinator)
            try:
                self._forwarding = await self._start_coordinator(adopt=True)
                return
            except RayActorError as error:
                logger.warning("another coordinator died as it started: %s", _first_line(error))
                await asyncio.sleep(_RETRY_S)

    async def _watch_silence(self) -> None:
        """End a coordinator that does not answer, so that there will be another."""
        while True:
            await asyncio.sleep(_SILENT_S / 4)
            coordinator, where = self._coordinator, self._where
            if where is None or self._mended_since is not None:
                continue
            try:
                async with asyncio.timeout(_SILENT_S):
                    await coordinator.progress.remote()
            except TimeoutError:
                logger.warning("the coordinator does not answer")
                if where.node == ray.util.get_node_ip_address():
                    with suppress(ProcessLookupError):
                        os.kill(where.pid, signal.SIGKILL)
                ray.kill(coordinator)
            except RayError:
                continue

    async def _replace(self, bundle: int) -> None:
        """Put another worker in ``bundle``; it starts when the lost one has left it."""
        self._workers.pop(bundle, None)
        while True:
            try:
                worker = await self._place(bundle)
                break
            except RayError as error:
                logger.warning("no worker could be started in bundle %d: %s", bundle, error)
                await asyncio.sleep(_RETRY_S)
        self._workers[bundle] = worker
        with suppress(RayActorError):  # the next coordinator is given all there are
            await self._coordinator.add_worker.remote(worker)


def _bundle(group: Any, index: int) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__} {(str(error).strip().splitlines() or [''])[0]}"
