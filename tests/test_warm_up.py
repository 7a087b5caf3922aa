"""What ranks that replay graphs do before the first request, and which shapes serving can need."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.cluster.engine.backend import EngineDeadError
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.ranks import LocalRanks, make_runner
from penstock.router.expert_budget import ExpertBudget
from penstock.workers.bucket import MAX_ROWS, Padding
from penstock.workers.plan import RequestPlan
from penstock.workers.runner import ModelRunner

from .static_steps import Padded
from .tiny_engine import GREEDY, PROMPTS, FailingRanks, config_of, generate

SIZES = [
    Padding(16, 4096),
    Padding(16, 131072, 256, 8),
    Padding(16, 40960, 32, 4),
    Padding(16, 1000, 3, 1),
    Padding(32, 131072, 24, 6),
]


def request(committed: int, num_rows: int) -> RequestPlan:
    from penstock.workers.sampling_params import TokenSampling

    parents = list(range(-1, num_rows - 1))
    return RequestPlan(0, committed, 0, [], [1] * num_rows, parents, 0, TokenSampling())


@pytest.mark.parametrize("padding", SIZES)
def test_steps_find_their_shape_among_the_first(padding: Padding) -> None:
    """Where contexts are read in place: whatever the configuration can bring, and nothing that it cannot."""
    rng, first, used = random.Random(1), padding.first(), set()
    assert len(first) == len(set(first)) <= 44
    for _ in range(3000):
        number = rng.randint(1, min(padding.max_num_seqs, 1 << rng.randint(0, 6)))
        rows = rng.randint(1, padding.max_num_rows)
        longest = padding.max_model_len >> rng.randint(0, 10)
        requests = [request(rng.randint(0, max(longest - rows, 0)), rng.randint(1, rows)) for _ in range(number)]
        bucket = padding.bucket_of([requests, []])
        if bucket is None:
            assert len(requests) * max(len(part.token_ids) for part in requests) > MAX_ROWS // 4
            continue
        assert bucket in first
        assert bucket.num_slots >= max(part.committed_len + len(part.token_ids) for part in requests)
        used.add(bucket)
    assert len(used) > 0.6 * len(first), "few are there for nothing"


def test_tables_are_short_or_whole() -> None:
    """A step's copy of block ids stays small while contexts are short."""
    assert len(Padding(16, 8192, 256, 8).first()) == 22
    assert len(Padding(16, 131072, 256, 8).first()) == 28
    by_requests = {}
    for bucket in Padding(16, 131072, 256, 8).first():
        by_requests.setdefault(bucket.num_requests, set()).add(bucket.num_slots)
    assert by_requests[1] == {131072}
    assert by_requests[64] == {8192, 131072}
    for number, sizes in by_requests.items():
        assert 8 * number * min(sizes) // 16 <= 2 * (256 << 10)


def test_gathered_contexts_are_padded_closely_and_bounded() -> None:
    padding = Padding(16, 8192, 64, 8, most_gathered=40_000)
    for length in range(1, 8192, 37):
        bucket = padding.bucket_of([[request(length - 1, 1)]])
        assert bucket is not None
        assert length <= bucket.num_slots <= max(256, 2 * length)
    assert padding.bucket_of([[request(700, 1)] * 64]) is None, "64 contexts of 1024 are too much to gather"
    assert padding.bucket_of([[request(600, 1)] * 8]) is not None
    assert all(bucket.num_slots <= 1024 for bucket in padding.first())
    assert all(bucket.num_slots * bucket.num_requests <= 40_000 for bucket in padding.first())


@pytest.fixture(scope="module")
def rank(checkpoint: Callable[[str], Path]) -> ModelRunner:
    return make_runner(config_of(checkpoint("qwen3_moe"), block_size=4, max_model_len=96, kv_cache_bytes=1 << 20), 0)


def engine_over(
    runner: ModelRunner, ranks: FailingRanks | None = None, **options: object
) -> tuple[Engine, FailingRanks]:
    runner.generation = -1
    watched = FailingRanks(Padded(LocalRanks(runner)), lambda call: False) if ranks is None else ranks
    config = config_of(
        Path("m"), block_size=4, max_num_seqs=4, max_num_batched_tokens=32, speculation="fixed", draft_len=3, **options
    )
    return Engine(config, watched), watched


def test_every_shape_runs_once_and_counts_nowhere(rank: ModelRunner) -> None:
    plain, _ = engine_over(rank)
    expected = generate(plain, PROMPTS, GREEDY)
    engine, ranks = engine_over(rank)
    engine.warm_up()
    buckets = [plan.ranks[0].bucket for plan in ranks.plans]
    assert {(b.num_requests, b.num_rows) for b in buckets} == {(r, n) for r in (1, 2, 4) for n in (1, 2, 4)}
    assert len(buckets) == len(set(buckets))
    assert buckets == sorted(buckets, key=lambda b: -b.total_rows), "the largest first"
    assert all(plan.is_warm_up for plan in ranks.plans)
    num_warm_ups = len(ranks.plans)
    assert generate(engine, PROMPTS, GREEDY) == expected
    stats = engine.stats()
    assert stats.num_steps == len(ranks.plans) - num_warm_ups == plain.stats().num_steps
    assert sum(map(sum, stats.by_rank.values())) == sum(map(sum, plain.stats().by_rank.values()))
    assert not any(plan.is_warm_up for plan in ranks.plans[num_warm_ups:])
    needed = {plan.ranks[0].bucket for plan in ranks.plans[num_warm_ups:]} - {None}
    assert needed <= set(buckets), "no request waits for a compiler"


def test_budgets_have_shapes_of_their_own(rank: ModelRunner) -> None:
    from penstock.cluster.engine.warm_up import warm_ups

    buckets = Padding(4, 96, 4, 4).first()
    few, fewer, other = (ExpertBudget.parse(text) for text in ("experts=4", "experts=3", "coverage=0.9"))
    steps = warm_ups(buckets, [few, fewer, other])
    with_drafts = sum(bucket.num_rows > 1 for bucket in buckets)
    assert [budget for _, budget in steps].count(None) == len(buckets)
    assert len(steps) == len(buckets) + 2 * with_drafts, "numbers of experts share shapes"


def test_a_failed_warm_up_is_run_again_until_it_fails_too_often(rank: ModelRunner) -> None:
    rank.generation = -1
    once = FailingRanks(Padded(LocalRanks(rank)), lambda call: call == 2)
    engine, _ = engine_over(rank, once)
    engine.warm_up()
    assert len(once.results) == 9
    assert once.recovered == [1]
    assert engine.stats().num_failed_steps == 1
    engine, _ = engine_over(rank, FailingRanks(Padded(LocalRanks(rank)), lambda call: True))
    with pytest.raises(EngineDeadError):
        engine.warm_up()


def test_ranks_without_graphs_run_nothing(rank: ModelRunner) -> None:
    rank.generation = -1
    ranks = FailingRanks(LocalRanks(rank), lambda call: False)
    engine, _ = engine_over(rank, ranks)
    engine.warm_up()
    assert not ranks.plans


def test_what_a_rank_must_compile_is_known_beforehand(rank: ModelRunner) -> None:
    engine, ranks = engine_over(rank)
    rank.padded.graphs.clear()
    fresh = replace(ranks.infos[0])
    assert fresh.replays_graphs
    engine.warm_up()
    plan = ranks.plans[0].ranks[0]
    assert not rank.has_to_compile(plan)
    rank.padded.graphs.clear()
    assert rank.has_to_compile(plan)
