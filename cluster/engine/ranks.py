"""The ranks as the engine sees them: one call a step, all or nothing."""

from __future__ import annotations

import time
from typing import Protocol

from ...router.placement import Placement
from ...workers.model_info import RankInfo
from ...workers.plan import StepFailedError, StepPlan, StepResult
from ...workers.runner import ModelRunner
from ..config import EngineConfig


class Ranks(Protocol):
    """All ranks of one engine, in rank order."""

    infos: list[RankInfo]

    def step(self, plan: StepPlan) -> StepResult:
        """Run one step everywhere; raise ``StepFailedError`` unless every rank answered this very step."""
        ...

    def recover(self, generation: int) -> None:
        """Make the ranks ready for plans of ``generation`` after a failed step; raise if they cannot be."""
        ...

    def close(self) -> None:
        """Let go of the ranks."""
        ...


def make_runner(config: EngineConfig, rank: int, placement: Placement | None = None) -> ModelRunner:
    """Load ``rank``'s shard as ``config`` says; ``placement``: what the file of that name holds, if one is named."""
    assert (placement is None) == (config.placement is None), "whoever starts the ranks reads the file"
    return ModelRunner(
        model=config.model,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        rank=rank,
        num_ranks=config.expert_parallel_size,
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        kv_cache_bytes=config.kv_cache_bytes,
        gpu_memory_utilization=config.gpu_memory_utilization,
        max_num_batched_tokens=config.max_num_batched_tokens,
        placement=placement,
    )


class LocalRanks:
    """The only rank, in this process and thread, without a process group."""

    def __init__(self, runner: ModelRunner) -> None:
        assert runner.num_ranks == 1
        self._runner = runner
        self.infos = [runner.info]

    def step(self, plan: StepPlan) -> StepResult:
        """Run the step here."""
        started = time.perf_counter()
        try:
            result = self._runner.step(plan.ranks[0])
        except Exception as error:  # whatever a model's code raises, the step is void
            raise StepFailedError(f"rank 0: {type(error).__name__}: {error}") from error
        return StepResult([result], time.perf_counter() - started)

    def recover(self, generation: int) -> None:
        """Nothing to do: the rank drops its tables when it sees the new generation."""

    def close(self) -> None:
        """Nothing is held."""
