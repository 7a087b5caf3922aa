"""How many gangs: Serve's own autoscaling, by what runs and waits in their engines.

Requests reach a gang past Serve, over the request plane, so the requests that Serve counts there are none. Each gang
reports its own (`Gang.record_autoscaling_stats`), and the policy below decides by their sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from ..config import EngineConfig

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

QUEUE_DEPTH = "queue_depth"
"""What a gang reports: requests running and waiting."""


def gangs_wanted(ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Return as many gangs as have ``target_ongoing_requests`` each; Serve rounds up, bounds and delays.

    Runs in Serve's controller. A gang that has not reported counts as one like the others, so that it neither hides
    load nor invites more gangs; with no reports at all the number stays.
    """
    reports = (ctx.aggregated_metrics or {}).get(QUEUE_DEPTH, {})
    depths = [reports[replica] for replica in ctx.running_replicas if replica in reports]
    if not depths:
        return ctx.target_num_replicas, {}
    assert ctx.config is not None, "it is ours"
    total = sum(depths) / len(depths) * len(ctx.running_replicas)
    return total / ctx.config.target_ongoing_requests, {}


def autoscaling(config: EngineConfig) -> AutoscalingConfig:
    """Return Serve's settings for a number of gangs that varies."""
    return AutoscalingConfig(
        min_replicas=config.fewest_replicas,
        max_replicas=config.most_replicas,
        target_ongoing_requests=config.target_requests_per_replica,
        upscale_delay_s=config.upscale_delay_s,
        downscale_delay_s=config.downscale_delay_s,
        policy=AutoscalingPolicy(policy_function=f"{__name__}:{gangs_wanted.__name__}"),
    )
