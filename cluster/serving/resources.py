"""What a gang takes of a Ray cluster, and the names it goes by there. Does not import Ray."""

from __future__ import annotations

from ..config import EngineConfig

NAMESPACE = "penstock"
COORDINATOR_PREFIX = "penstock-coordinator:"
REPLICA_CPUS = 0.1
COORDINATOR_CPUS = 0.4


def bundles(config: EngineConfig, *, gpu: bool) -> list[dict[str, float]]:
    """Return the placement group of one gang: its replica, its coordinator, then one bundle a rank."""
    rank = {"CPU": config.cpus_per_rank, **({"GPU": 1.0} if gpu else {})}
    return [{"CPU": REPLICA_CPUS}, {"CPU": COORDINATOR_CPUS}, *[dict(rank) for _ in range(config.expert_parallel_size)]]
