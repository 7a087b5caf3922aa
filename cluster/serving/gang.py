"""The Serve deployment whose replica is one gang: a coordinator and the workers of all its ranks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ...router.placement import Placement
from ..config import EngineConfig
from ..engine.budget import EngineBudget
from .autoscaling import QUEUE_DEPTH
from .coordinator import Coordinator
from .resources import COORDINATOR_CPUS, COORDINATOR_PREFIX, NAMESPACE, rank_order
from .worker import Worker


class Gang:
    """Owns the actors of one gang, which die with it. Serve's constructor call returns when all ranks have loaded."""

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

        group = ray.util.get_current_placement_group()
        workers: list[Any] = [
            ray.remote(Worker)
            .options(
                max_concurrency=2,
                num_cpus=config.cpus_per_rank,
                num_gpus=int(gpu),
                scheduling_strategy=_bundle(group, 2 + rank),
            )
            .remote()
            for rank in range(config.expert_parallel_size)
        ]
        nodes = await asyncio.gather(*[worker.node.remote() for worker in workers])
        order = rank_order(nodes)
        self._workers = [workers[i] for i in order]
        replica = serve.get_replica_context()
        coordinator: Any = ray.remote(Coordinator).options(
            max_concurrency=10_000,
            num_cpus=COORDINATOR_CPUS,
            name=f"{COORDINATOR_PREFIX}{replica.app_name}:{replica.replica_id.unique_id}",
            namespace=NAMESPACE,
            scheduling_strategy=_bundle(group, 1),
        )
        self._coordinator = coordinator.remote(config, self._workers, [nodes[i] for i in order], placement, budgets)
        await self._coordinator.load.remote()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve where the number of gangs varies."""
        stats = await self._coordinator.stats.remote()
        return {QUEUE_DEPTH: stats.num_requests_running + stats.num_requests_waiting}

    async def check_health(self) -> None:
        """Called by Serve; a gang that cannot serve is replaced as a whole."""
        await self._coordinator.check_health.remote()

    async def __del__(self) -> None:
        """Called by Serve, which waits for it, before it stops this gang: live requests end first."""
        if self._coordinator is not None:
            with suppress(RayError):  # a coordinator that is gone has none
                await self._coordinator.drain.remote()


def _bundle(group: Any, index: int) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
