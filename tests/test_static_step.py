"""Steps padded to buckets: what a GPU replays as a graph, here run one operation after another."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from penstock.cluster.engine.ranks import LocalRanks, make_runner
from penstock.router.expert_budget import ExpertBudget
from penstock.workers import page_attention
from penstock.workers.bucket import MAX_ROWS, Padding
from penstock.workers.failed_capture import end_capture
from penstock.workers.plan import Bucket, RankPlan, RequestPlan
from penstock.workers.runner import ModelRunner
from penstock.workers.sampler import accept
from penstock.workers.static_rows import StaticRows
from penstock.workers.static_step import StaticStep, StepShape

from .blind_runner import OnTheDevice, blind_runner
from .static_steps import (
    BLOCK,
    DRAWN,
    SEEDED,
    STEPS,
    Padded,
    chain,
    exact_counts,
    outputs_of,
    padded,
    prompts,
    request,
    runner_of,
)
from .tiny_engine import DRAFT_LENS, GREEDY, config_of

if TYPE_CHECKING:
    from penstock.cluster.transport.process_ranks import ProcessRanks

__all__ = ["blind_runner"]


@pytest.fixture(scope="module")
def runner_for(checkpoint: Callable[[str], Path]) -> Callable[[str], ModelRunner]:
    made: dict[str, ModelRunner] = {}

    def make(model_type: str) -> ModelRunner:
        if model_type not in made:
            made[model_type] = runner_of(checkpoint(model_type))
        return made[model_type]

    return make


@pytest.mark.parametrize("budget", [None, "experts=4,scope=request", "experts=5,scope=source", "coverage=0.7"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_padded_step_is_the_step(
    runner_for: Callable[[str], ModelRunner], model_type: str, step: str, budget: str | None
) -> None:
    runner = runner_for(model_type)
    runner.step(prompts())
    parsed = None if budget is None else ExpertBudget.parse(budget)
    first = None if budget is None else 0
    requests = [replace(part, first_budgeted_row=first if len(part.token_ids) > 1 else None) for part in STEPS[step]]
    acts = any(part.first_budgeted_row is not None for part in requests)
    plan = RankPlan(0, 1, requests=requests, budget=parsed if acts else None)
    padding = padded(plan, runner)
    with torch.inference_mode():
        launched, replayed = runner._launched(plan), runner.padded.run(padding)
    torch.testing.assert_close(replayed.logits, launched.logits, rtol=1e-4, atol=1e-5)
    assert replayed.positions == launched.positions
    counts, expected = (exact_counts(found.counts) for found in (replayed, launched))
    assert counts == expected
    assert replayed.counts.weight_kept == pytest.approx(launched.counts.weight_kept, rel=1e-5)
    assert replayed.kept_weights.keys() == launched.kept_weights.keys()
    assert (replayed.tokens is None) == (step == "filtered")
    # Last, since they move an accepted path's KV
    assert runner.step(padding).token_ids == runner.step(plan).token_ids


def test_a_number_of_experts_is_an_input_of_the_same_operations(runner_for: Callable[[str], ModelRunner]) -> None:
    runner = runner_for("qwen3_moe")
    runner.step(prompts())
    runner.padded.graphs.clear()
    requests = [replace(part, first_budgeted_row=0) for part in STEPS["mixed"]]
    read = {}
    for number in (8, 2, 5, 2, 8):
        plan = RankPlan(0, 1, requests=requests, budget=ExpertBudget(experts=number))
        with torch.inference_mode():
            experts = runner.padded.run(padded(plan, runner)).counts.experts
            assert experts == runner._launched(plan).counts.experts
        assert read.setdefault(number, experts) == experts
    assert len(runner.padded.graphs._steps) == 1
    assert sum(read[2]) < sum(read[5]) < sum(read[8])


# --- nothing for the host to wait for --------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, "experts=4,scope=request", "coverage=0.7"])
@pytest.mark.parametrize("blind_runner", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss"], indirect=True)
def test_the_host_learns_nothing_of_a_step_while_it_runs(blind_runner: ModelRunner, budget: str | None) -> None:
    shape = StepShape.of(Bucket(4, 2, 32), None if budget is None else ExpertBudget.parse(budget))
    rows = StaticRows(shape.bucket, BLOCK, blind_runner.cache.scratch_slot, torch.device("meta"))
    step = StaticStep(shape, rows, blind_runner._forward, blind_runner.experts, blind_runner.layers, blind_runner.log)
    with torch.inference_mode(), OnTheDevice() as seen:
        step.run()
    assert seen.operations
    assert [part.shape for part in step._results] == [
        (8 + 2 * blind_runner.info.model.num_moe_layers,),
        (0 if budget is None else blind_runner.info.model.num_moe_layers, 8),
    ]


@pytest.mark.parametrize("blind_runner", ["qwen3_moe", "gpt_oss", "gemma4_text", "deepseek_v3"], indirect=True)
def test_the_host_learns_nothing_of_the_pages_that_a_step_reads(
    blind_runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def attend(query: Any, keys: Any, values: Any, mask: Any, sinks: Any, scaling: Any, absorbed: Any) -> torch.Tensor:
        """Look at all that the kernel does."""
        r, n = query.shape[0], query.shape[2]
        read.append((mask.kv_num_blocks.shape, mask.kv_indices.shape, mask.shape[-2:]))
        slots = mask.kv_indices * BLOCK
        places = [torch.zeros_like(slots).expand(r, 1, n, -1)] * 3
        hidden = torch.where(mask.mask_mod(*places, slots), 0, mask.kv_num_blocks[..., None]).sum(-1)
        width = values.shape[-1] if absorbed is None else absorbed.to_values.shape[1]
        return query.new_empty(*query.shape[:-1], width) + hidden[..., None]

    monkeypatch.setattr(page_attention, "attend", attend)
    blind_runner.padded.objection = ""
    step = blind_runner.padded.step_of(StepShape.of(Bucket(4, 2, 32), None))
    with torch.inference_mode(), OnTheDevice():
        step.run()
    slots = blind_runner.cache.scratch_slot + BLOCK
    assert set(read) == {((4, 1, 1), (4, 1, 1, 64 // BLOCK), (2, slots))}
    assert len(read) == blind_runner.info.model.num_layers


@pytest.mark.parametrize("blind_runner", ["qwen3_moe"], indirect=True)
def test_a_step_that_asks_the_device_is_found(blind_runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = StepShape.of(Bucket(4, 2, 32), None)
    rows = StaticRows(shape.bucket, BLOCK, blind_runner.cache.scratch_slot, torch.device("meta"))
    step = StaticStep(shape, rows, blind_runner._forward, blind_runner.experts, blind_runner.layers, blind_runner.log)
    for asks in (
        lambda ids: int(ids.sum()),
        lambda ids: ids.tolist(),
        lambda ids: ids.cpu(),
        lambda ids: ids.nonzero(),
    ):
        shard = blind_runner.experts.shards[0]
        monkeypatch.setattr(shard, "run", lambda hidden, ids, weights, asks=asks: (hidden, asks(ids)))
        with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), torch.inference_mode(), OnTheDevice():
            step.run()


# --- in an engine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("draft_len", DRAFT_LENS)
def test_an_engine_publishes_the_same_tokens(
    checkpoint: Callable[[str], Path], draft_len: int | str, params: Any
) -> None:
    config = config_of(checkpoint("qwen3_moe"))
    ranks = LocalRanks(make_runner(config, 0))
    expected, plain = outputs_of(config, ranks, draft_len, params)
    found, watched = outputs_of(config, Padded(ranks), draft_len, params)
    assert found == expected
    assert not any(rank.bucket for plan in plain.plans for rank in plan.ranks)
    assert sum(rank.bucket is not None for plan in watched.plans for rank in plan.ranks) > 10


@pytest.mark.distributed
@pytest.mark.parametrize("budget", [None, "experts=4,scope=global"])
def test_ranks_exchange_room_for_all_rows(
    checkpoint: Callable[[str], Path], budget: str | None, process_ranks: type[ProcessRanks]
) -> None:
    config = replace(config_of(checkpoint("qwen3_moe"), 2), expert_budget=budget)
    ranks = process_ranks(config)
    try:
        expected, plain = outputs_of(config, ranks, 3, GREEDY)
        found, watched = outputs_of(config, Padded(ranks), 3, GREEDY)
    finally:
        ranks.close()
    assert found == expected
    pairs = [
        (padded_rank, rank)
        for padded_step, step in zip(watched.results, plain.results, strict=True)
        for padded_rank, rank in zip(padded_step.ranks, step.ranks, strict=True)
    ]
    assert [exact_counts(found.counts) for found, _ in pairs] == [exact_counts(wanted.counts) for _, wanted in pairs]
    assert sum(sum(found.counts.rows_sent) for found, _ in pairs) > 0
    # Room for all rows, and one collective a layer less
    some = [pair for pair in pairs if pair[0].num_collectives != pair[1].num_collectives]
    assert len(some) > 10
    assert all(found.num_collectives < wanted.num_collectives for found, wanted in some)


# --- buckets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([STEPS["plain"]], Bucket(4, 1, 64)),
        ([STEPS["one"], []], Bucket(1, 4, 64)),
        ([STEPS["mixed"], STEPS["one"]], Bucket(4, 8, 64)),
        ([[]], Bucket(1, 1, 64)),
        ([prompts().requests], None),
        ([[request(0, chain(8), SEEDED)] * 9], None),
        ([[request(0, chain(2), SEEDED, targets=[4])]], None),
    ],
)
def test_the_smallest_bucket_that_holds_all_ranks(ranks: list[list[RequestPlan]], expected: Bucket | None) -> None:
    assert Padding(BLOCK, 64).bucket_of(ranks) == expected


def test_contexts_grow_by_doubling() -> None:
    padding = Padding(16, 3000, most_gathered=1 << 20)
    sizes = [padding.bucket_of([[replace(request(0, [-1], SEEDED), committed_len=length)]]) for length in range(3000)]
    slots = [bucket.num_slots for bucket in sizes if bucket is not None]
    assert len(slots) == 3000
    assert sorted(set(slots)) == [256, 512, 1024, 2048, 3008]
    assert all(length + 1 <= size <= max(256, 2 * length) for length, size in enumerate(slots))
    assert max(_full(num_rows).total_rows for num_rows in (1, 2, 4, 8)) == MAX_ROWS


def _full(num_rows: int) -> Bucket:
    most = MAX_ROWS // num_rows
    bucket = Padding(BLOCK, 64).bucket_of([[request(0, chain(num_rows), SEEDED)] * most])
    assert bucket is not None
    return bucket


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_that_asks_the_device_is_launched_as_it_is(
    checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Phi's rotary positions are made on the host, in every step."""
    runner = ModelRunner(
        model=str(checkpoint("phimoe")), device="cuda", block_size=BLOCK, max_model_len=64, kv_cache_bytes=1 << 20
    )
    runner.step(prompts())
    plan = RankPlan(0, 1, requests=STEPS["mixed"])
    for _ in range(2):
        assert runner.step(padded(plan, runner)).token_ids == runner.step(plan).token_ids
    assert "are launched operation by operation" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_capture_that_fails_is_in_the_way_of_no_other() -> None:
    values, present = torch.ones(4, device="cuda"), torch.cuda.current_stream()
    for _ in range(2):
        pool = torch.cuda.graph_pool_handle()
        with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph(), pool=pool):
            (values + 1).sum().item()
        torch.cuda.set_stream(present)
        end_capture(pool)
        torch.cuda.empty_cache()
        assert torch.randn(4, device="cuda").isfinite().all()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=torch.cuda.graph_pool_handle()):
            total = (values + 1).sum()
        values += 1
        graph.replay()
        assert total == 4 + values.sum()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replayed_graph_keeps_to_a_changing_budget(checkpoint: Callable[[str], Path]) -> None:
    runner = ModelRunner(
        model=str(checkpoint("qwen3_moe")), device="cuda", block_size=BLOCK, max_model_len=64, kv_cache_bytes=1 << 20
    )
    assert runner.info.replays_graphs
    assert runner.padded.known_routers, "the kernel routes"
    runner.step(prompts())
    requests = [replace(part, first_budgeted_row=0) for part in STEPS["mixed"]]
    for number in (8, 2, 5, 2, 8):
        plan = RankPlan(0, 1, requests=requests, budget=ExpertBudget(experts=number))
        with torch.inference_mode():
            replayed, launched = runner.padded.run(padded(plan, runner)), runner._launched(plan)
        torch.testing.assert_close(replayed.logits, launched.logits, rtol=1e-3, atol=1e-3)
        assert replayed.counts.experts == launched.counts.experts
        assert replayed.tokens is not None
        assert replayed.accepted is not None
        starts = np.cumsum([0, *(part.num_sampled_rows for part in requests)])
        tokens = [replayed.tokens[start:stop] for start, stop in itertools.pairwise(starts)]
        assert replayed.accepted == [accept(part, own) for part, own in zip(requests, tokens, strict=True)]
    assert len(runner.padded.graphs._graphs) == 1
