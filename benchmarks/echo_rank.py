"""A rank without a model: it answers every plan at once, with as many tokens and counts as a real one would."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..cluster.config import EngineConfig
from ..cluster.transport.process_ranks import parent_is_gone, read_settings
from ..cluster.transport.rank_loop import run_rank
from ..router.placement import Placement
from ..workers.loader import DenseModel
from ..workers.model_info import ModelInfo, RankInfo
from ..workers.plan import LayerCounts, RankPlan, RankResult

NUM_MOE_LAYERS = 48
"""As many layers' counts as Qwen3-30B-A3B would report."""


@dataclass(slots=True)
class EchoStep:
    """Takes the place of `LaunchedStep`."""

    plan: RankPlan

    def has_ended(self) -> bool:
        """It has nothing to do."""
        return True


class EchoRunner:
    """Takes the place of `ModelRunner`."""

    def __init__(self, config: EngineConfig, rank: int, placement: Placement | None, dense: DenseModel | None) -> None:
        self.rank, self.num_ranks = rank, config.expert_parallel_size
        self.device, self.mover = torch.device("cpu"), None
        model = ModelInfo("Echo", "echo", "float32", 1, 1, NUM_MOE_LAYERS, NUM_MOE_LAYERS, 1, 1, 1, ())
        self.info = RankInfo(rank, model, [1], 0, 0, 0, 0, 1, 1, 0.0)

    def disconnect(self) -> None:
        """Hold nothing of a group."""

    def connect(self, group: object, absent: object = ()) -> None:
        """Nothing is dispatched."""

    def check_device(self) -> None:
        """There is none."""

    def can_follow(self, plan: RankPlan, running: EchoStep) -> bool:
        """Steps are over when they have been launched."""
        return False

    def has_to_compile(self, plan: RankPlan) -> bool:
        """Nothing has."""
        return False

    def can_be_followed(self, running: EchoStep) -> bool:
        """Likewise."""
        return False

    def launch(self, plan: RankPlan, behind: EchoStep | None = None) -> EchoStep:
        """Take a step."""
        return EchoStep(plan)

    def finish(self, step: EchoStep) -> RankResult:
        """Answer."""
        return answer(step.plan, self.rank)


def answer(plan: RankPlan, rank: int) -> RankResult:
    """Return a result of a real one's size: one token per row."""
    numbers = [128] * NUM_MOE_LAYERS
    return RankResult(
        generation=plan.generation,
        step_id=plan.step_id,
        rank=rank,
        token_ids=[list(request.token_ids) for request in plan.requests],
        counts=LayerCounts(numbers, numbers, numbers, numbers, numbers),
        num_collectives=3 * NUM_MOE_LAYERS,
        collectives_crc=0,
        thread_time_s=0.0,
        ran_s=0.0,
    )


if __name__ == "__main__":
    run_rank(read_settings(), parent_is_gone, EchoRunner)  # type: ignore[arg-type]
