"""A rank is lost whose experts the others hold as well: they go on without it, until it is there again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.events import FAULT, RECOVERY
from penstock.cluster.engine.ranks import LocalRanks, make_runner
from penstock.cluster.placement_file import PlacementFile
from penstock.cluster.transport.process_ranks import ProcessRanks
from penstock.router.placement import Placement, contiguous
from penstock.workers.plan import StepPlan, StepResult
from penstock.workers.sampling_params import SamplingParams

from .tiny_engine import PROMPTS, Published, config_of, drain, generate

SAMPLING = SamplingParams(temperature=1.0, seed=5, max_tokens=40, ignore_eos=True, frequency_penalty=0.3)
NUM_RANKS, LOST = 3, 1
FAULT_STEP = 10


def twofold(num_layers: int, num_ranks: int = NUM_RANKS) -> Placement:
    """Every expert on two neighbours."""
    layer = tuple(tuple(sorted({expert % num_ranks, (expert + 1) % num_ranks})) for expert in range(8))
    return Placement(8, num_ranks, (layer,) * num_layers)


class Ranks(ProcessRanks):
    """Ranks that keep what they are asked, and the processes that they are."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.plans: list[StepPlan] = []
        self.absent_in: list[tuple[int, ...]] = []

    def collect(self, plan: StepPlan) -> StepResult:
        result = super().collect(plan)
        self.plans.append(plan)
        self.absent_in.append(tuple(self._absent))
        return result

    def kill(self, rank: int) -> None:
        process = self._roster.of_rank[rank].process._process  # type: ignore[attr-defined]
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def config(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    directory = checkpoint("qwen3_moe")
    alone = config_of(directory)
    num_layers = make_runner(alone, 0).info.model.num_moe_layers
    path = tmp_path_factory.mktemp("placement") / "placement.json"
    PlacementFile.of(twofold(num_layers), "balanced", "qwen3_moe").write(path)
    return config_of(directory, NUM_RANKS, placement=str(path), max_num_seqs=8, step_timeout_s=10.0, draft_len=2)


@pytest.fixture(scope="module")
def expected(config: EngineConfig) -> list[list[int]]:
    alone = replace(config, expert_parallel_size=1, placement=None)
    return generate(Engine(alone, LocalRanks(make_runner(alone, 0))), PROMPTS, SAMPLING)


@pytest.mark.distributed
@pytest.mark.parametrize("dies_again", [False, True], ids=["", "its-replacement-dies-too"])
def test_the_others_go_on_and_nobody_notices(config: EngineConfig, expected: list[list[int]], dies_again: bool) -> None:
    ranks = Ranks(config)
    try:
        engine, published = Engine(config, ranks, events=ranks.events), Published()
        for index, prompt in enumerate(PROMPTS):
            engine.add_request(str(index), prompt, SAMPLING)
        for _ in range(FAULT_STEP):
            published.take(engine.step())
        num_lost = len(ranks.plans[-1].ranks[LOST].requests)
        assert 0 < num_lost < len(PROMPTS)
        ranks.kill(LOST)
        drain(engine, published)
        assert [published[str(index)] for index in range(len(PROMPTS))] == expected
        degraded = [plan for plan, absent in zip(ranks.plans, ranks.absent_in, strict=True) if absent == (LOST,)]
        assert len(degraded) > 5
        assert not any(plan.ranks[LOST].requests for plan in degraded)
        assert sum(len(rank.requests) for rank in degraded[0].ranks) == len(PROMPTS), "replayed by the others"
        if dies_again:
            ranks.kill(LOST)
        deadline_s = time.monotonic() + 60
        while ranks._absent or ranks._lost:
            assert time.monotonic() < deadline_s
            if engine.ranks.tend():  # type: ignore[attr-defined]
                engine.recover()
        assert generate(engine, PROMPTS, SAMPLING) == expected
        assert ranks.absent_in[-1] == ()
        assert any(plan.ranks[LOST].requests for plan in ranks.plans[-10:])
        kinds = [event.kind for event in ranks.events.events()]
        assert kinds == [FAULT, RECOVERY, *[FAULT, RECOVERY] * dies_again, RECOVERY]
        first, *_, last = (event for event in ranks.events.events() if event.kind == RECOVERY)
        assert first.message == f"the others go on without rank {LOST}"
        assert (first.expert_bytes_loaded, first.num_requests_replayed) == (0, num_lost)
        assert last.message.startswith(f"rank {LOST} is there again")
        assert last.expert_bytes_loaded > 0
        engine.scheduler.check_integrity()
    finally:
        ranks.close()


def test_what_is_left_of_a_placement_has_the_same_numbers_on_each_rank() -> None:
    placement = twofold(2, 4)
    left = placement.without([1])
    assert left is not None
    assert left.num_ranks == 3
    for number, rank in enumerate((0, 2, 3)):
        assert left.experts_of(0, number) == placement.experts_of(0, rank)
        owners, local = left.owner_table(1, number).tolist(), left.local_ids(1, number).tolist()
        for expert in range(8):
            assert left.experts_of(1, owners[expert]).index(expert) == local[expert]
    assert placement.without([]) is placement
    assert placement.without([0, 1]) is None, "both held expert 0"
    assert placement.without([0, 2]) is not None
    assert contiguous(1, 8, 4).without([3]) is None
