"""Experts move between ranks under live requests, ranks die meanwhile, and no token changes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.events import FINISHED, INTERRUPTED, REBALANCE, RECOVERY
from penstock.cluster.engine.ranks import LocalRanks, make_runner
from penstock.cluster.placement_file import placement_of
from penstock.cluster.transport.curve import LOOPBACK
from penstock.cluster.transport.messages import Command, Run
from penstock.cluster.transport.process_ranks import ProcessRanks, _ChildProcess
from penstock.cluster.transport.rank_loop import RankSettings
from penstock.cluster.transport.remote_ranks import RemoteRanks
from penstock.cluster.transport.roster import RankProcess
from penstock.router.rebalance import imbalance
from penstock.workers.plan import StepPlan, StepResult
from penstock.workers.rebalance_plan import RebalancePlan
from penstock.workers.sampling_params import SamplingParams

from .tiny_engine import PROMPTS, config_of, generate

pytestmark = pytest.mark.distributed
SAMPLING = SamplingParams(temperature=1.0, seed=5, max_tokens=100, ignore_eos=True, frequency_penalty=0.3)
BYTES_PER_STEP = 4000


class Ranks(ProcessRanks):
    """Ranks of which one dies in the first step that ``is_fatal``, before it hears of it."""

    is_fatal: Callable[[RebalancePlan], bool] = staticmethod(lambda _: False)
    most_bytes = 0
    computed: Any = 0
    """[R] pairs of row and expert."""

    def submit(self, plan: StepPlan) -> None:
        part = plan.ranks[0].rebalance
        assert part is not None
        for rank in range(2):
            for end in ("source", "target"):
                moved = sum(t.stop - t.start for t in part.transfers if getattr(t, end) == rank)
                self.most_bytes = max(self.most_bytes, moved)
        if self.is_fatal(part):
            self.is_fatal = lambda _: False
            process = self._roster.of_rank[1].process._process  # type: ignore[attr-defined]
            process.kill()
            process.wait()
        super().submit(plan)

    def collect(self, plan: StepPlan) -> StepResult:
        result = super().collect(plan)
        part = plan.ranks[0].rebalance
        assert part is not None
        if part.wants_loads:
            self.computed = self.computed + np.array([rank.expert_loads.computed for rank in result.ranks]).sum(axis=1)
        return result


def config(directory: Path, **options: object) -> EngineConfig:
    options = {"eplb_window_size": 16, "eplb_step_interval": 16, "eplb_bytes_per_step": BYTES_PER_STEP, **options}
    batch = {"max_num_batched_tokens": 24, "max_num_seqs": 8}
    return config_of(directory, 2, enable_eplb=True, step_timeout_s=10.0, **batch, **options)


@pytest.fixture(scope="module")
def expected(checkpoint: Callable[[str], Path]) -> list[list[int]]:
    """Return the tokens of one rank."""
    alone = replace(config(checkpoint("qwen3_moe")), expert_parallel_size=1, enable_eplb=False)
    return generate(Engine(alone, LocalRanks(make_runner(alone, 0))), PROMPTS, SAMPLING)


@pytest.fixture(scope="module")
def ranks(checkpoint: Callable[[str], Path]) -> Iterator[Ranks]:
    """Two ranks, which share two of eight experts to begin with, and a spare."""
    ranks = Ranks(config(checkpoint("qwen3_moe"), num_redundant_experts=2, num_spares=1))
    yield ranks
    ranks.close()


def test_the_work_evens_out_and_no_token_changes(ranks: Ranks, expected: list[list[int]]) -> None:
    before = ranks.placed
    assert before is not None
    engine = Engine(ranks._config, ranks, events=ranks.events)
    assert engine.stats().balance is not None
    assert generate(engine, PROMPTS, SAMPLING) == expected
    event = next(event for event in ranks.events.events() if event.kind == REBALANCE)
    assert event.what == FINISHED
    assert event.expert_bytes_loaded == event.num_experts_moved * ranks.infos[0].bytes_per_expert[0] > 0
    assert ranks.placed is not None
    assert ranks.placed.number > 0
    assert ranks.placed.placement != before.placement
    assert 0 < ranks.most_bytes <= BYTES_PER_STEP < ranks.infos[0].bytes_per_expert[0]
    balance = engine.stats().balance
    assert balance is not None
    assert balance.imbalance is not None
    assert 1 <= balance.imbalance <= 2
    # The same rows once more, where they are now
    ranks.computed = 0
    assert generate(Engine(replace(ranks._config, eplb_step_interval=1 << 30), ranks), PROMPTS, SAMPLING) == expected
    assert imbalance(ranks.computed) < 1.1


@pytest.mark.parametrize("when", ["transfers", "changes"])
def test_a_rank_that_dies_meanwhile_is_replaced_by_one_with_the_present_experts(
    ranks: Ranks, expected: list[list[int]], when: str
) -> None:
    """In the middle of what is sent, or in the very step in which all switch."""
    ranks.is_fatal = lambda part: bool(getattr(part, when)) and (when == "changes" or part.transfers[0].start > 0)
    num_before = len(ranks.events.events())
    # Other rows than before, or there is nothing to move
    sampling = replace(SAMPLING, seed=(6, 7)[when == "changes"])
    hot = [[9] * 12, [9, 9, 9], [9] * 20]
    engine = Engine(ranks._config, ranks, events=ranks.events)
    tokens = generate(engine, hot, sampling)
    events = ranks.events.events()[num_before:]
    assert [event.ranks for event in events if event.kind == RECOVERY] == [(1,)]
    outcomes = [event.what for event in events if event.kind == REBALANCE]
    assert outcomes[0] == (INTERRUPTED if when == "transfers" else outcomes[0])
    assert outcomes.count(FINISHED) >= 1, "it goes on to balance afterwards"
    still = replace(ranks._config, eplb_step_interval=1 << 30)
    assert generate(Engine(still, ranks, events=ranks.events), hot, sampling) == tokens
    # The ranks hold what is said that they hold, or these would differ
    assert generate(Engine(still, ranks, events=ranks.events), PROMPTS, SAMPLING) == expected


class Successor(RemoteRanks):
    """Another coordinator over the processes of one that is gone."""

    def __init__(self, ranks: ProcessRanks) -> None:
        placement = placement_of(ranks._config)
        self._left = list(ranks.processes)
        super().__init__(ranks._config, LOOPBACK, self._take_over, placement, node=LOOPBACK)
        self.start(num_adopted=len(ranks.processes))

    def _take_over(self, settings: RankSettings) -> RankProcess:
        process = self._left.pop(0)
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(settings) + b"\n")
        process.stdin.flush()
        return _ChildProcess(process)


def test_another_coordinator_learns_where_experts_are(
    checkpoint: Callable[[str], Path], expected: list[list[int]]
) -> None:
    """Also of a switch of which one rank has not heard."""
    program = str(Path(__file__).with_name("adoptable_rank.py"))
    first = ProcessRanks(config(checkpoint("qwen3_moe"), num_redundant_experts=2), [sys.executable, program])
    try:
        send, last = first._watch.send, {"number": 0}

        def lose_a_switch(rank: int, command: Command) -> None:
            part = command.plan.rebalance if isinstance(command, Run) else None
            if part is not None and part.changes and rank == 1:
                last["number"] = part.version
                raise KeyboardInterrupt  # the coordinator is gone in the middle of it
            send(rank, command)

        first._watch.send = lose_a_switch  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            generate(Engine(first._config, first), PROMPTS, SAMPLING)
        second = Successor(first)
        try:
            assert second.placed is not None
            assert second.placed.number == last["number"] > 0
            assert second.placed.placement != placement_of(first._config)
            assert generate(Engine(first._config, second), PROMPTS, SAMPLING) == expected
        finally:
            second.close()
    finally:
        first.close()
