"""Steps that are launched behind those that the host has not heard of: the same tokens, and nothing waits for ever."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.ranks import LaunchingRanks, LocalRanks, make_runner
from penstock.workers.collective_guard import CollectiveGuard
from penstock.workers.launched_step import LaunchedStep
from penstock.workers.plan import SAMPLED_LAST, Bucket, RankPlan, RequestPlan
from penstock.workers.process_group import open_store
from penstock.workers.runner import ModelRunner
from penstock.workers.sampling_params import SamplingParams, TokenSampling
from penstock.workers.static_rows import StaticRows

from .tiny_engine import GREEDY, PROMPTS, Published, config_of, controller_of, drain, generate

if TYPE_CHECKING:
    from penstock.cluster.transport.process_ranks import ProcessRanks

SAMPLED = SamplingParams(temperature=1.0, seed=5, max_tokens=40, ignore_eos=True)
SMALL: dict[str, Any] = {"block_size": 4, "max_model_len": 96, "kv_cache_bytes": 1 << 20, "draft_len": 0}
BATCH: dict[str, Any] = {"max_num_batched_tokens": 24, "max_num_seqs": 8}

# --- one rank ---------------------------------------------------------------------------------------------------------


class Launching(LaunchingRanks):
    """Counts what is launched behind something, by the buckets of both."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner)
        self.pairs: list[tuple[Bucket | None, Bucket | None]] = []

    def _launch(self, plan: RankPlan, behind: LaunchedStep | None = None) -> None:
        super()._launch(plan, behind)
        if behind is not None:
            self.pairs.append((behind.plan.bucket, plan.bucket))


@pytest.fixture(scope="module")
def asynchronous(checkpoint: Callable[[str], Path]) -> ModelRunner:
    """Return a rank whose device is taken to compute by itself, and whose steps are padded as those of such are."""
    runner = make_runner(config_of(checkpoint("qwen3_moe"), **SMALL), 0)
    runner.is_asynchronous, runner.info = True, replace(runner.info, replays_graphs=True)
    return runner


def serve_at_random(engine: Engine, seed: int) -> dict[str, list[int]]:
    """Return what requests got that come while others decode, of all kinds, some of which are dropped."""
    rng, published = random.Random(seed), Published()
    kinds = [*[GREEDY, SAMPLED] * 8, replace(SAMPLED, presence_penalty=1.0), replace(SAMPLED, top_k=3)]
    for number in range(60):
        if number < 40 and rng.random() < 0.3:
            prompt = [rng.randrange(1, 64) for _ in range(rng.randint(1, 30))]
            limit = rng.randint(1, 40)
            engine.add_request(str(number), prompt, replace(rng.choice(kinds), max_tokens=limit, seed=number))
        if rng.random() < 0.05:
            engine.abort(str(rng.randrange(number + 1)))
        published.take(engine.step())
    return dict(drain(engine, published))


@pytest.mark.parametrize("seed", range(3))
def test_requests_that_come_and_go_get_their_tokens(asynchronous: ModelRunner, seed: int) -> None:
    config = config_of(Path("m"), **SMALL, **BATCH)
    asynchronous.generation = -1
    found = serve_at_random(Engine(config, ranks := Launching(asynchronous)), seed)
    asynchronous.generation = -1
    # What is aborted has got as far as it has, which is another place where steps are one ahead
    expected = serve_at_random(Engine(replace(config, async_scheduling=False), LocalRanks(asynchronous)), seed)
    for number in found.keys() & expected.keys():
        shorter = min(len(found[number]), len(expected[number]))
        assert found[number][:shorter] == expected[number][:shorter]
    whole = [number for number in expected if found.get(number) == expected[number]]
    assert len(whole) > 0.8 * len(expected)
    assert len(ranks.pairs) > 20
    assert any(before != after for before, after in ranks.pairs), "tokens pass from one bucket to another"


def test_a_step_that_fails_takes_the_one_behind_it_along(
    asynchronous: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(Path("m"), **SMALL, **BATCH)
    asynchronous.generation = -1
    expected = generate(Engine(config, LocalRanks(asynchronous)), PROMPTS, SAMPLED)
    finish, failures = asynchronous.finish, [12]

    def failing(step: LaunchedStep) -> Any:
        result = finish(step)
        if [step.plan.step_id] == failures:
            failures.clear()
            raise RuntimeError("planted")
        return result

    monkeypatch.setattr(asynchronous, "finish", failing)
    asynchronous.generation = -1
    engine = Engine(config, ranks := Launching(asynchronous))
    assert generate(engine, PROMPTS, SAMPLED) == expected
    assert engine.stats().num_failed_steps == 1
    assert not failures
    assert len(ranks.pairs) > 30


@pytest.mark.parametrize("params", [replace(SAMPLED, top_p=0.9), replace(SAMPLED, logprobs=1)])
def test_what_the_host_samples_is_not_launched_ahead(asynchronous: ModelRunner, params: SamplingParams) -> None:
    config = config_of(Path("m"), **SMALL, **BATCH)
    asynchronous.generation = -1
    ranks = Launching(asynchronous)
    generate(Engine(config, ranks), PROMPTS, params)
    assert not ranks.pairs


def test_nothing_is_launched_behind_drafts(asynchronous: ModelRunner) -> None:
    """But behind the last row of a request that has room for no more."""
    config = config_of(Path("m"), **SMALL, **BATCH)
    asynchronous.generation = -1
    ranks = Launching(asynchronous)
    generate(Engine(config, ranks, controller=controller_of(3)), PROMPTS, GREEDY)
    assert all(before is not None and before.num_rows == 1 for before, _ in ranks.pairs)
    assert len(ranks.pairs) < 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_graphs_replayed_one_behind_the_other_give_the_same_tokens(
    checkpoint: Callable[[str], Path], params: SamplingParams
) -> None:
    config = config_of(checkpoint("qwen3_moe"), device="cuda", **SMALL, **BATCH)
    runner = make_runner(config, 0)
    assert runner.is_asynchronous
    expected = generate(Engine(replace(config, async_scheduling=False), LocalRanks(runner)), PROMPTS, params)
    runner.generation = -1
    engine = Engine(config, ranks := Launching(runner))
    engine.warm_up()
    assert generate(engine, PROMPTS, params) == expected
    assert len(ranks.pairs) > 10


def test_tokens_are_taken_from_where_the_step_before_left_them() -> None:
    """By request, whatever its place there and here, and from nowhere else."""
    device, left = torch.device("cpu"), torch.full((8,), 77)
    before = StaticRows(Bucket(2, 4, 32), 4, 32, device, None, left)
    after = StaticRows(Bucket(4, 1, 32), 4, 32, device, None, left)
    tables = {number: np.arange(8) for number in range(3)}

    def part(number: int, tokens: list[int]) -> RequestPlan:
        parents = [*range(-1, len(tokens) - 1)]
        return RequestPlan(number, 4, 0, [], tokens, parents, len(tokens) - 1, TokenSampling())

    before.fill(RankPlan(0, 0, requests=[part(0, [5, 6, 7]), part(1, [8])]), tables)
    before.keep(torch.arange(100, 108))
    assert left.tolist() == [102, 104, *[77] * 6]
    requests = [part(1, [SAMPLED_LAST]), part(2, [9]), part(0, [SAMPLED_LAST])]
    after.fill(RankPlan(0, 1, requests=requests), tables, {0: 0, 1: 1})
    assert after.layout().token_ids.tolist()[:3] == [104, 9, 102]


# --- ranks in processes of their own ----------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("early", [False, True], ids=["after its collectives", "before them"])
def test_two_ranks_launch_ahead_and_survive_a_failure(
    checkpoint: Callable[[str], Path],
    asynchronous: ModelRunner,
    process_ranks: type[ProcessRanks],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    early: bool,
) -> None:
    config = config_of(checkpoint("qwen3_moe"), 2, draft_len=0, **BATCH, step_timeout_s=2.0 if early else 20.0)
    asynchronous.generation = -1
    alone = replace(config, expert_parallel_size=1, block_size=4, max_model_len=96, async_scheduling=False)
    expected = generate(Engine(alone, LocalRanks(asynchronous)), PROMPTS, SAMPLED)
    monkeypatch.setenv("PENSTOCK_TEST_LAUNCHED", str(tmp_path / "launched"))
    if early:
        monkeypatch.setenv("PENSTOCK_TEST_FAIL_EARLY", "1")
    ranks = process_ranks(config, [sys.executable, str(Path(__file__).with_name("faulty_rank.py"))])
    try:
        ranks.infos[:] = [replace(info, replays_graphs=True) for info in ranks.infos]
        recover, gave_up = ranks.recover, []
        ranks.recover = lambda generation: gave_up.append(ranks._watch.store is None) or recover(generation)
        engine = Engine(config, ranks)
        assert generate(engine, PROMPTS, SAMPLED) == expected
        stats = engine.stats()
    finally:
        ranks.close()
    assert stats.num_failed_steps == 1
    assert gave_up == [True], "what guards the other rank hears of the failure at once"
    for rank in range(2):
        assert (tmp_path / f"launched.{rank}").stat().st_size > 10, "steps launched behind others"


class Plane:
    """What a rank's loop is told and says, in one thread."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def send(self, answer: Any) -> None:
        self.said.append(answer)


class StuckRunner:
    """A device whose collectives end when they are aborted, and not before."""

    rank = 0

    def __init__(self) -> None:
        self.aborted, self.num_disconnected = threading.Event(), 0
        self.device_error: Exception | None = None

    def can_follow(self, plan: RankPlan, running: Any) -> bool:
        return True

    def can_be_followed(self, running: Any) -> bool:
        return True

    def has_to_compile(self, plan: RankPlan) -> bool:
        return False

    def launch(self, plan: RankPlan, behind: Any = None) -> LaunchedStep:
        return LaunchedStep(plan, self.aborted.is_set, lambda: None)  # type: ignore[arg-type, return-value]

    def finish(self, step: LaunchedStep) -> str:
        assert self.aborted.wait(10), "somebody must abort it"
        return "garbage"

    def disconnect(self) -> None:
        self.num_disconnected += 1

    def check_device(self) -> None:
        if self.device_error is not None:
            raise self.device_error


@pytest.fixture
def stuck() -> Iterator[tuple[StuckRunner, Any, Callable[[], None]]]:
    """Return such a device, the loop that drives it, and what makes the coordinator give its group up."""
    pytest.importorskip("zmq")
    pytest.importorskip("msgspec")
    from penstock.cluster.transport.rank_loop import RankLoop

    store, address = open_store("127.0.0.1")
    watched = dist.TCPStore(address.host, address.port, is_master=False, timeout=timedelta(seconds=10))
    runner, loop, stores = StuckRunner(), RankLoop(), [store]
    del store
    loop._runner, loop._guard = runner, CollectiveGuard(watched, 30.0, runner.aborted.set)  # type: ignore[assignment]
    yield runner, loop, stores.clear
    assert loop._guard is not None
    loop._guard.close()


def test_a_collective_whose_group_is_given_up_fails_both_steps(stuck: Any) -> None:
    """Of which the second was launched behind the first, and worth as little."""
    runner, loop, give_up = stuck
    plane = Plane()
    loop._run(plane, RankPlan(3, 1))
    give_up()
    loop._run(plane, RankPlan(3, 2))
    loop._answer(plane)
    first, second = (said.error for said in plane.said)
    assert (first.step_id, second.step_id) == (1, 2)
    assert "collectives were aborted: the coordinator gave the group up" in first.message
    assert "a step before this one has failed" in second.message
    assert runner.num_disconnected, "the abort waits for graphs"


def test_a_device_that_computes_no_more_ends_the_process(stuck: Any) -> None:
    runner, loop, give_up = stuck
    plane = Plane()
    loop._run(plane, RankPlan(0, 0))
    runner.device_error = RuntimeError("an illegal memory access was encountered")
    give_up()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        loop._answer(plane)
    assert not plane.said, "whoever watches the process is told by its end"
