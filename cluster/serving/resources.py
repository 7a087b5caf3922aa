"""What a gang takes of a Ray cluster, and the names it goes by there. Does not import Ray."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from ..config import EngineConfig

NAMESPACE = "penstock"
COORDINATOR_PREFIX = "penstock-coordinator:"
COORDINATOR_NUMBER = "~"
"""Before the number of a gang's coordinator: its first is 0, which another one may follow."""
REPLICA_CPUS = 0.1
COORDINATOR_CPUS = 0.4
FIRST_WORKER_BUNDLE = 2


def bundles(config: EngineConfig, *, gpu: bool) -> list[dict[str, float]]:
    """Return the placement group of one gang: its replica, its coordinator, then one bundle for each rank and spare."""
    worker = {"CPU": config.cpus_per_rank, **({"GPU": 1.0} if gpu else {})}
    num_workers = config.expert_parallel_size + config.num_spares
    return [{"CPU": REPLICA_CPUS}, {"CPU": COORDINATOR_CPUS}, *[dict(worker) for _ in range(num_workers)]]


def num_ranks(config: EngineConfig) -> int:
    """Return how many ranks all gangs that are there from the start have."""
    return config.fewest_replicas * config.expert_parallel_size


def rank_order(nodes: Sequence[str]) -> list[int]:
    """Return which worker each rank is, by the addresses of the workers' machines.

    Placement groups order their bundles by no rule; ranks of one machine should be neighbours.
    """
    return sorted(range(len(nodes)), key=lambda i: (ipaddress.ip_address(nodes[i]), i))
