"""What a rebalance asks of the ranks in one step, and what they say of their experts' load.

Shapes: L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Transfer:
    """Some bytes of an expert, from a rank that holds it to one that is to."""

    layer: int
    expert: int
    source: int
    target: int
    start: int
    stop: int
    """Bytes ``start`` to ``stop`` of what makes the expert (`ExpertShard.tensors`)."""


@dataclass(frozen=True, slots=True)
class RebalancePlan:
    """One step's part in a rebalance; the same on all ranks."""

    version: int
    """Of the placement that this step runs under."""
    changes: dict[int, dict[int, tuple[int, ...]]] = field(default_factory=dict)
    """By layer and expert: the ranks that hold it from this version on, where they are others than before."""
    staging: int = 0
    """The version that ``transfers`` are for."""
    transfers: list[Transfer] = field(default_factory=list)
    wants_loads: bool = False
    """Whether ranks are to say what their experts had to do."""


@dataclass(frozen=True, slots=True)
class ExpertLoads:
    """What a rank has counted since it was asked last; steps that were discarded count too, padding does not."""

    chosen: list[list[int]]
    """[L][E] this rank's rows that chose each expert."""
    computed: list[int]
    """[L] pairs of row and expert that this rank computed, whosever rows they were."""
