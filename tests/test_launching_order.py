"""Steps that are launched behind those that nobody has finished: the same tokens, and no question to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.output import RequestOutput
from penstock.cluster.engine.ranks import LaunchingRanks, LocalRanks, ranks_of
from penstock.router.expert_budget import ExpertBudget
from penstock.workers.launched_step import LaunchedStep, can_be_followed, can_follow
from penstock.workers.plan import SAMPLED_LAST, Bucket, RankPlan, RequestPlan, StepPlan, StepResult
from penstock.workers.rebalance_plan import RebalancePlan, Transfer
from penstock.workers.runner import ModelRunner
from penstock.workers.sampling_params import LogitAdjustments, SamplingParams, TokenSampling
from penstock.workers.static_rows import StaticRows
from penstock.workers.static_step import StaticStep, StepShape

from .blind_runner import OnTheDevice, blind_runner
from .static_steps import BLOCK
from .tiny_engine import GREEDY, PROMPTS, generate

__all__ = ["blind_runner"]
BUCKET = Bucket(2, 1, 256)
PLAIN = TokenSampling()


def part(key: int = 0, num_rows: int = 1, first_sampled: int = 0, sampling: TokenSampling = PLAIN) -> RequestPlan:
    tokens, parents = list(range(num_rows)), list(range(-1, num_rows - 1))
    return RequestPlan(key, 8, 0, [1, 2, 3, 4], tokens, parents, first_sampled, sampling)


# --- which step may follow which -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"requests": [part(0), part(1, 3, 2), part(2, 4, 4)]}, True),
        ({"budget": ExpertBudget(experts=4)}, True),
        ({"rebalance": RebalancePlan(3, staging=2)}, True),
        ({"bucket": None}, False),
        ({"requests": [part(0), part(1, 2, 0)]}, False),
        ({"requests": [part(sampling=replace(PLAIN, logprobs=0))]}, False),
        ({"requests": [part(sampling=replace(PLAIN, temperature=1.0, top_k=3))]}, False),
        ({"requests": [part(sampling=replace(PLAIN, adjustments=LogitAdjustments(frequency_penalty=0.5)))]}, False),
        ({"requests": [replace(part(), targets=[4])]}, False),
        ({"rebalance": RebalancePlan(3, changes={0: {1: (0,)}})}, False),
        ({"rebalance": RebalancePlan(3, transfers=[Transfer(0, 1, 0, 1, 0, 9)])}, False),
        ({"rebalance": RebalancePlan(3, wants_loads=True)}, False),
    ],
)
def test_a_step_is_followed_if_the_host_has_no_part_in_what_comes_next(changes: dict[str, Any], expected: bool) -> None:
    plan = RankPlan(0, 1, BUCKET, [part()])
    running = replace(plan, **changes)
    assert can_be_followed(running) == can_follow(plan, running) == expected


def test_a_step_of_many_kinds_can_follow() -> None:
    running = RankPlan(0, 1, BUCKET, [part()])
    for changes, expected in (
        ({"requests": [part(sampling=replace(PLAIN, logprobs=0)), part(1, 2)]}, True),
        ({"bucket": Bucket(4, 2, 512)}, True),
        ({"bucket": None}, False),
        ({"generation": 1}, False),
        ({"rebalance": RebalancePlan(3, wants_loads=True)}, False),
        ({"rebalance": RebalancePlan(4, changes={0: {1: (0,)}})}, False),
    ):
        assert can_follow(replace(running, step_id=2, **changes), running) == expected, changes


# --- a model on one rank ---------------------------------------------------------------------------------------------


class Launches(LaunchingRanks):
    """Counts steps that are launched behind one that has not been finished, and says that they are to be padded."""

    def __init__(self, local: LocalRanks, *, fails: Callable[[int], str] = lambda call: "") -> None:
        super().__init__(local._runner)
        self.infos = [replace(info, replays_graphs=True) for info in local.infos]
        self.num_steps = self.num_behind = 0
        self.buckets: list[tuple[Bucket | None, Bucket | None]] = []
        """Of steps of which one was launched behind the other."""
        self._fails = fails

    def _launch(self, plan: RankPlan, behind: LaunchedStep | None = None) -> None:
        self.num_steps += 1
        if behind is not None:
            self.num_behind += 1
            self.buckets.append((behind.plan.bucket, plan.bucket))
        if self._fails(self.num_steps) == "launch":
            self._running.append(RuntimeError("planted"))
            return
        super()._launch(plan, behind)

    def collect(self, plan: StepPlan) -> StepResult:
        number = self.num_steps - bool(len(self._running) > 1)
        if self._fails(number) == "finish":
            self._running[0] = RuntimeError("planted")
        return super().collect(plan)


@pytest.fixture
def asynchronous(runner: ModelRunner) -> Iterator[None]:
    runner.is_asynchronous = True
    yield
    runner.is_asynchronous = False


OPTIONS = {"draft_len": 0, "max_num_batched_tokens": 16, "max_num_seqs": 6}
DRAWN = SamplingParams(temperature=0.9, seed=11, max_tokens=14, ignore_eos=True)
MIXES = {
    "plain": [GREEDY, DRAWN],
    "host": [GREEDY, replace(DRAWN, top_k=20, logprobs=2), replace(DRAWN, logit_bias={7: 2.0}, max_tokens=5)],
    "penalties": [GREEDY, replace(DRAWN, frequency_penalty=0.4, max_tokens=6)],
    "stops": [replace(GREEDY, stop_token_ids=tuple(range(0, 96, 7)), max_tokens=30), DRAWN],
}


def serve(engine: Engine, samplings: list[SamplingParams]) -> dict[str, Any]:
    """Serve all prompts with each sampling, one more request joining in every other step."""
    waiting = [(f"{i} {j}", prompt, one) for i, prompt in enumerate(PROMPTS) for j, one in enumerate(samplings)]
    merged: dict[str, RequestOutput] = {}
    number = 0
    while waiting or engine.has_requests:
        if waiting and number % 2 == 0:
            engine.add_request(*waiting.pop(0))
        number += 1
        for output in engine.step():
            earlier = merged.get(output.request_id)
            merged[output.request_id] = output if earlier is None else earlier.followed_by(output)
    engine.scheduler.check_integrity()
    return {
        name: (output.token_ids, output.finish_reason, output.logprobs and output.logprobs.token_ids)
        for name, output in merged.items()
    }


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.usefixtures("asynchronous")
def test_a_model_publishes_the_same(make_engine: Callable[..., Engine], mix: str) -> None:
    expected = serve(make_engine(**OPTIONS), MIXES[mix])
    engine = make_engine(Launches, **OPTIONS)
    assert serve(engine, MIXES[mix]) == expected
    ranks: Any = engine.ranks
    ranks.num_steps = ranks.num_behind = 0
    assert serve(engine, MIXES[mix]) == expected, "all shapes have been made"
    if mix in ("plain", "stops"):
        assert ranks.num_behind >= 0.4 * ranks.num_steps, "prompts are not padded"
        sizes = {(before.num_requests, after.num_requests) for before, after in ranks.buckets if before and after}
        assert len(sizes) > 4, "from one bucket to another"
    else:
        assert ranks.num_behind > 0


@pytest.mark.parametrize("how", ["launch", "finish"])
@pytest.mark.usefixtures("asynchronous")
def test_a_step_that_fails_takes_what_was_launched_behind_it_along(
    make_engine: Callable[..., Engine], how: str
) -> None:
    expected = generate(make_engine(**OPTIONS), PROMPTS[:2], DRAWN)
    for failed in range(1, 12):
        engine = make_engine(
            lambda local, failed=failed: Launches(local, fails=lambda call: how if call == failed else ""), **OPTIONS
        )
        assert generate(engine, PROMPTS[:2], DRAWN) == expected
        assert engine.stats().num_failed_steps == 1
    ranks: Any = engine.ranks
    assert ranks.num_behind > 5


class Apart(Launches):
    """Launches each step when the one before has been finished."""

    def submit(self, plan: StepPlan) -> None:
        self._runner.is_asynchronous = False
        super().submit(plan)
        self._runner.is_asynchronous = True


@pytest.mark.usefixtures("asynchronous")
def test_counts_are_those_of_their_own_step(make_engine: Callable[..., Engine]) -> None:
    def counts(wrap: Callable[[LocalRanks], Launches]) -> tuple[list[Any], int]:
        engine = make_engine(wrap, **OPTIONS)
        ranks: Any = engine.ranks
        collect, found = ranks.collect, []

        def watched(plan: StepPlan) -> StepResult:
            result = collect(plan)
            found.append((plan.step_id, [(rank.counts, rank.num_collectives) for rank in result.ranks]))
            return result

        ranks.collect = watched
        generate(engine, PROMPTS, DRAWN)
        return found, ranks.num_behind

    expected, num_behind = counts(Apart)
    assert num_behind == 0
    found, num_behind = counts(Launches)
    assert found == expected
    assert num_behind > 5


def test_a_rank_is_driven_as_its_device_allows(runner: ModelRunner) -> None:
    assert not runner.is_asynchronous, "a CPU's steps are over when they have been launched"
    assert type(ranks_of(runner)) is LocalRanks
    runner.is_asynchronous = True
    try:
        assert type(ranks_of(runner)) is LaunchingRanks
    finally:
        runner.is_asynchronous = False


def test_a_shape_that_has_not_run_is_not_launched_behind_another(runner: ModelRunner) -> None:
    """Its operations run several times before they are captured, and each time would take another token."""
    runner.padded.graphs.clear()
    runner.generation = -1
    first = RankPlan(0, 0, Bucket(1, 1, 64), [replace(part(), committed_len=0, token_ids=[5])])
    runner.is_asynchronous = True
    try:
        running = runner.launch(first)
        again, other = replace(first, step_id=1), replace(first, step_id=1, bucket=Bucket(2, 1, 64))
        assert runner.can_be_followed(running)
        assert runner.can_follow(again, running)
        assert not runner.can_follow(other, running)
        runner.finish(running)
    finally:
        runner.is_asynchronous = False


# --- on the device ---------------------------------------------------------------------------------------------------


def shares(one: Any, memory: torch.Tensor) -> bool:
    return isinstance(one, torch.Tensor) and one.untyped_storage()._cdata == memory.untyped_storage()._cdata


@pytest.mark.parametrize("blind_runner", ["qwen3_moe"], indirect=True)
def test_a_step_takes_tokens_from_where_the_one_before_left_them(blind_runner: ModelRunner) -> None:
    """Steps of two shapes, on tensors without numbers: whoever asked for one would fail."""
    device = torch.device("meta")
    last = torch.zeros(64, dtype=torch.int64, device=device)
    steps = []
    for bucket in (Bucket(2, 1, 32), Bucket(4, 2, 32)):
        rows = StaticRows(bucket, BLOCK, blind_runner.cache.scratch_slot, device, last_tokens=last)
        given = blind_runner._forward, blind_runner.experts, blind_runner.layers, blind_runner.log
        steps.append(StaticStep(StepShape.of(bucket, None), rows, *given))
    seen: list[tuple[int, str, bool]] = []

    class Touching(OnTheDevice):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            given = torch.utils._pytree.tree_leaves((args, kwargs))
            if not func.is_view and any(shares(one, last) for one in given):
                seen.append((number, str(func), shares((kwargs or {}).get("out"), last)))
            return result

    with torch.inference_mode(), Touching():
        for number in range(len(steps)):
            steps[number].run()
    assert seen == [
        (0, "aten.cat.default", False),
        (0, "aten.index_select.out", True),
        (1, "aten.cat.default", False),
        (1, "aten.index_select.out", True),
    ]


def test_what_was_written_for_a_step_outlives_the_writing_of_the_next() -> None:
    rows = StaticRows(Bucket(2, 2, 16), 4, 64, torch.device("cpu"), last_tokens=torch.arange(100, 164))
    tables: Any = {0: torch.arange(4).numpy(), 1: torch.arange(4, 8).numpy()}
    first = RankPlan(0, 0, rows.bucket, [part(0, 2, 1), part(1)])
    second = RankPlan(0, 1, rows.bucket, [replace(part(1), token_ids=[SAMPLED_LAST]), part(0)])
    rows.fill(first, tables)
    written = rows._hosts[rows._turn]
    kept = written.clone()
    assert rows.layout().token_ids.tolist() == [0, 1, 0, 0]
    rows.keep(torch.tensor([50, 51, 52, 53]))
    assert rows.last_tokens[:2].tolist() == [51, 52], "of the last row of each"
    rows.fill(second, tables, {0: 0, 1: 1})
    assert torch.equal(written, kept), "it may still be on its way to the device"
    assert rows.layout().token_ids.tolist() == [52, 0, 0, 0]
