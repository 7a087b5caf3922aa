"""What ranks that replay graphs do before the first request: steps of nothing but padding, one for each shape.

A shape's first step compiles its attention and captures its graph, which takes seconds, and would take them from
whoever asks first. These steps go the way of all steps, so that ranks run their collectives together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from ...router.expert_budget import ExpertBudget
from ...workers.bucket import Padding
from ...workers.model_info import RankInfo
from ...workers.plan import Bucket
from ...workers.static_step import StepShape
from ..config import EngineConfig
from .stepper import Stepper

logger = logging.getLogger(__name__)


def padding_of(config: EngineConfig, infos: Sequence[RankInfo], max_draft_len: int) -> Padding | None:
    """Return what steps are padded to; None unless all ranks replay graphs.

    A rank that gathers contexts bounds the sizes for all.
    """
    if not all(info.replays_graphs for info in infos):
        return None
    limits = [info.most_gathered_slots for info in infos if info.most_gathered_slots is not None]
    return Padding(
        block_size=config.block_size,
        max_model_len=infos[0].model.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_rows=max_draft_len + 1,
        most_gathered=min(limits, default=None),
    )


def warm_ups(buckets: Sequence[Bucket], budgets: Sequence[ExpertBudget]) -> list[tuple[Bucket, ExpertBudget | None]]:
    """Return one step of every shape, the exact ones first.

    A budget acts on drafts, so no request of a step under one has a single row; budgets that differ in their number of
    experts alone share shapes.
    """
    steps: dict[StepShape, tuple[Bucket, ExpertBudget | None]] = {}
    for budget in (None, *budgets):
        for bucket in buckets:
            if budget is None or bucket.num_rows > 1:
                steps.setdefault(StepShape.of(bucket, budget), (bucket, budget))
    return list(steps.values())


def warm_up(stepper: Stepper, steps: Sequence[tuple[Bucket, ExpertBudget | None]]) -> None:
    """Run ``steps`` and log what they took; one that fails is run again, as any other.

    Raises ``EngineDeadError`` after ``max_step_retries`` failures in a row.
    """
    started_s = time.perf_counter()
    results = []
    for bucket, budget in steps:
        while (result := stepper.run_padding(bucket, budget)) is None:
            pass
        results = result.ranks
    logger.info(
        "ran steps of %d shapes in %.1f s; a rank has %d graphs, which take %.2f GiB",
        len(steps),
        time.perf_counter() - started_s,
        max((rank.num_graphs for rank in results), default=0),
        max((rank.graph_bytes for rank in results), default=0) / (1 << 30),
    )
