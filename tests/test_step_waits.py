"""How long a step ran, as its rank says, and how long ranks waited for it, as the engine makes of that."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.engine import Engine
from penstock.cluster.speculation.batch import Batch
from penstock.cluster.speculation.fixed import FixedController
from penstock.cluster.speculation.observation import StepObservation
from penstock.workers import runner as runner_module
from penstock.workers.plan import Bucket, RankPlan, RequestPlan, StepPlan, StepResult
from penstock.workers.runner import ModelRunner
from penstock.workers.sampling_params import SamplingParams, TokenSampling

from .queued_ranks import QueuedRanks
from .scripted_ranks import ScriptedRanks
from .tiny_engine import drain

RAN_S = (0.004, 0.010)
"""How long each rank has a step."""
AFTER_S, AHEAD_S = 0.003, 0.0005


class ClockedRanks(QueuedRanks):
    """Its clock goes on by what each step waited, and by what the ranks ran it, the longest."""

    now_s = 0.0

    def __init__(self, ranks: ScriptedRanks) -> None:
        super().__init__(ranks)
        self._waits_s: list[float] = []

    def submit(self, plan: StepPlan) -> None:
        self._waits_s.append(AHEAD_S if self._waiting else AFTER_S)
        super().submit(plan)

    def collect(self, plan: StepPlan) -> StepResult:
        self.now_s += max(RAN_S) + self._waits_s.pop(0)
        result = super().collect(plan)
        return replace(result, ranks=[replace(rank, ran_s=RAN_S[rank.rank]) for rank in result.ranks])


class Watching(FixedController):
    """Drafts nothing; every other time it does not say so beforehand."""

    def __init__(self) -> None:
        super().__init__(0)
        self.seen: list[StepObservation] = []
        self._num_asked = 0

    def rests(self, batch: Batch) -> bool:
        self._num_asked += 1
        return self._num_asked % 2 == 0

    def observe(self, step: StepObservation) -> None:
        self.seen.append(step)


def observed(*, async_scheduling: bool) -> list[StepObservation]:
    """Return the steps of two requests, one after the other."""
    ranks = ClockedRanks(ScriptedRanks([8, 8], 4, 32))
    config = EngineConfig(model="m", block_size=4, expert_parallel_size=2, async_scheduling=async_scheduling)
    controller = Watching()
    engine = Engine(config, ranks, controller=controller, clock=lambda: ranks.now_s)
    for name in ("first", "second"):
        engine.add_request(name, [4, 5], SamplingParams(temperature=0, max_tokens=12))
        drain(engine)
        assert engine.step() == []
        ranks.now_s += 9.0
    return controller.seen


def test_a_wait_is_what_ranks_did_not_run_between_two_results() -> None:
    steps = observed(async_scheduling=True)
    assert {step.was_ahead for step in steps} == {False, True}
    firsts = [place for place, step in enumerate(steps) if step.waited_s is None]
    assert firsts == [0, len(steps) // 2], "a moment without requests is no wait"
    for step in steps:
        if step.waited_s is not None:
            assert step.waited_s == pytest.approx(AHEAD_S if step.was_ahead else AFTER_S)


def test_nobody_waits_where_steps_are_never_sent_ahead() -> None:
    steps = observed(async_scheduling=False)
    assert {(step.was_ahead, step.waited_s) for step in steps} == {(False, None)}


@pytest.fixture
def ticking(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> ModelRunner:
    """A runner whose clock goes on by a second each time it looks at it."""
    runner = ModelRunner(model=str(checkpoint("qwen3_moe")), block_size=8, max_model_len=64, kv_cache_bytes=1 << 20)
    ticks = count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)), thread_time=time.thread_time)
    monkeypatch.setattr(runner_module, "time", clock)
    return runner


def plan_of(step_id: int) -> RankPlan:
    request = RequestPlan(0, 0, 0, [1, 2, 3, 4], [5], [-1], 0, TokenSampling())
    return RankPlan(0, step_id, Bucket(1, 1, 64), [request])


def test_a_step_runs_from_the_launch_of_its_rank_to_its_end(ticking: ModelRunner) -> None:
    for number in range(2):
        assert ticking.finish(ticking.launch(plan_of(number))).ran_s == 1.0


def test_a_device_that_computes_by_itself_begins_when_it_was_told_to_or_the_step_before_has_ended(
    ticking: ModelRunner,
) -> None:
    ticking.is_asynchronous = True
    first = ticking.launch(plan_of(0))
    second = ticking.launch(plan_of(1), first)
    # Of the launches each looks twice: told at 1 and 3, ended at 4 and 5
    assert ticking.finish(first).ran_s == 3.0
    assert ticking.finish(second).ran_s == 1.0
