"""A step that a device has been given and the host has not heard of since; and which step may follow it there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .computed_step import ComputedStep
from .plan import RankPlan
from .rebalance_plan import RebalancePlan
from .static_sampler import samples_plainly


@dataclass(slots=True)
class LaunchedStep:
    """One rank's step, under way or over."""

    plan: RankPlan
    has_ended: Callable[[], bool]
    """Whether `computed` has nothing to wait for."""
    computed: Callable[[], ComputedStep]
    """Waits for the device; to be called once, before a step is launched behind the one that follows."""
    thread_time_s: float = 0.0
    """CPU time of the thread that launched it, for that."""
    started_s: float = 0.0
    """When it began to be computed, unless a step before it still was; by ``time.perf_counter``."""


def can_be_followed(plan: RankPlan) -> bool:
    """Return whether a step can be launched behind this one before the host has heard of its end.

    The device itself chooses its tokens, of a request one at most, and needs no word from the host to go on.
    """
    return (
        plan.bucket is not None
        and all(request.num_sampled_rows <= 1 for request in plan.requests)
        and samples_plainly(plan.requests)
        and _leaves_experts_alone(plan.rebalance)
    )


def can_follow(plan: RankPlan, running: RankPlan) -> bool:
    """Return whether ``plan`` can be launched behind ``running`` before the host has heard of that one's end."""
    return (
        can_be_followed(running)
        and plan.bucket is not None
        and plan.generation == running.generation
        and _leaves_experts_alone(plan.rebalance)
    )


def _leaves_experts_alone(plan: RebalancePlan | None) -> bool:
    """Whether no experts move, or take others' places, and nobody asks what they had to do."""
    return plan is None or not (plan.changes or plan.transfers or plan.wants_loads)
