"""The ranks as the engine sees them: one call a step, all or nothing."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from ...kernels.fused_moe import kernel
from ...router.placement import Placement, PlacementVersion
from ...workers.device import resolve_device
from ...workers.launched_step import LaunchedStep
from ...workers.loader import DenseModel, build, inspect, load_dense, resolve_dtype
from ...workers.model_info import RankInfo
from ...workers.packed_weights import packs_weights
from ...workers.plan import RankPlan, StepFailedError, StepPlan, StepResult
from ...workers.runner import ModelRunner
from ..config import EngineConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Replacement:
    """A rank that was lost, and is another process since: its KV is gone. `Ranks.infos` has what it loaded."""

    rank: int
    what: str
    """How it was lost, as in `Event.what`."""
    lost_s: float
    """When that was noticed, by ``time.monotonic``."""
    was_spare: bool
    """Whether a spare took its place."""
    is_absent: bool = False
    """Whether nobody has taken it yet, and the others go on without it."""


class Ranks(Protocol):
    """All ranks of one engine, in rank order."""

    infos: list[RankInfo]

    def step(self, plan: StepPlan) -> StepResult:
        """Run one step everywhere; raise ``StepFailedError`` unless every rank answered this very step."""
        ...

    def recover(self, generation: int) -> Sequence[Replacement]:
        """Make the ranks ready for plans of ``generation`` after a failed step; raise if they cannot be.

        Ranks that are not named in the answer keep their KV.
        """
        ...

    def close(self) -> None:
        """Let go of the ranks."""
        ...


@runtime_checkable
class QueueingRanks(Ranks, Protocol):
    """Ranks that take the plan of a step while they run the one before, and run both in that order."""

    def submit(self, plan: StepPlan) -> None:
        """Hand a step over and do not wait for it; at most one other has not been collected."""
        ...

    def collect(self, plan: StepPlan) -> StepResult:
        """Wait for the oldest step that was submitted, which is ``plan``; raises as `step` does.

        After a failure every step that was submitted is given up, and `recover` comes next. ``wall_s`` of the result is
        the time since the ranks could begin with the step.
        """
        ...


@runtime_checkable
class MovableRanks(Ranks, Protocol):
    """Ranks that can hand experts to each other."""

    placed: PlacementVersion | None
    """Where experts are, which a rank that is replaced loads; whoever moves them sets it. None: they stay."""


def make_runner(
    config: EngineConfig, rank: int, placement: Placement | None = None, dense: DenseModel | None = None
) -> ModelRunner:
    """Load ``rank``'s shard as ``config`` says; ``placement``: what `placement_of` made of it, or came of that.

    ``dense``: what `prepare` returned.
    """
    named = config.placement is not None or config.enable_eplb
    assert (placement is None) == (not named), "whoever starts the ranks reads the file"
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
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enforce_eager=config.enforce_eager,
        placement=placement,
        moved_bytes=config.eplb_bytes_per_step if config.enable_eplb else None,
        dense=dense,
    )


def prepare(config: EngineConfig) -> DenseModel | None:
    """Load all that every rank has alike, so that `make_runner` need only read one rank's experts.

    Returns None where that cannot be: on one of several GPUs, since which of them is a matter of the rank, and with a
    checkpoint that cannot be read, which is left to the loading to complain about.
    """
    try:
        directory, model_config = inspect(config.model, config.revision)
        dtype = resolve_dtype(model_config, config.dtype)
        device = resolve_device(config.device, 0)
        empty = build(model_config, dtype)
        if packs_weights(dtype, device):
            kernel()
        if device.type == "cuda" and torch.cuda.device_count() > 1:
            return None
        return load_dense(directory, empty, device)
    except (OSError, ValueError) as error:
        logger.warning("a spare could not prepare itself: %s", error)
        return None


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

    def recover(self, generation: int) -> Sequence[Replacement]:
        """Nothing to do: the rank drops its tables when it sees the new generation."""
        return ()

    def close(self) -> None:
        """Nothing is held."""


class LaunchingRanks(LocalRanks):
    """The same on a device that computes by itself: it is given the next step while it computes the one before."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner)
        self._running: deque[LaunchedStep | Exception] = deque()
        """Steps that were launched, or could not be; none behind one that could not."""
        self._waiting: RankPlan | None = None
        """The plan of a step that cannot be launched yet."""
        self._started_s = 0.0
        """When the device could begin with the oldest step."""

    def step(self, plan: StepPlan) -> StepResult:
        """Run the step and wait for it."""
        self.submit(plan)
        return self.collect(plan)

    def submit(self, plan: StepPlan) -> None:
        """Launch the step, now or when the one before has ended."""
        (part,) = plan.ranks
        if not self._running:
            self._started_s = time.perf_counter()
            self._launch(part)
            return
        (before,) = self._running
        if isinstance(before, LaunchedStep) and self._runner.can_follow(part, before):
            self._launch(part, behind=before)
        else:
            self._waiting = part

    def collect(self, plan: StepPlan) -> StepResult:
        """Wait for the oldest step."""
        step = self._running.popleft()
        assert isinstance(step, Exception) or step.plan.step_id == plan.step_id, "steps are collected in order"
        try:
            if isinstance(step, Exception):
                raise step
            result = self._runner.finish(step)
        except Exception as error:  # whatever a model's code raises, the step is void
            raise StepFailedError(f"rank 0: {type(error).__name__}: {error}") from error
        started_s, self._started_s = self._started_s, time.perf_counter()
        if self._waiting is not None:
            self._launch(self._waiting)
            self._waiting = None
        return StepResult([result], self._started_s - started_s)

    def _launch(self, plan: RankPlan, behind: LaunchedStep | None = None) -> None:
        try:
            self._running.append(self._runner.launch(plan, behind))
        except Exception as error:  # said when the step is collected
            self._running.append(error)

    def recover(self, generation: int) -> Sequence[Replacement]:
        """Let go of all steps."""
        self._running.clear()
        self._waiting = None
        return ()


def ranks_of(runner: ModelRunner) -> LocalRanks:
    """Return the only rank, driven as its device allows."""
    return LaunchingRanks(runner) if runner.is_asynchronous else LocalRanks(runner)
