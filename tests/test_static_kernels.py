"""Padded steps through Triton's kernels: the same step as through torch's operations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from .triton_device import DEVICE

from penstock.benchmarks import step_launches  # isort: skip
from penstock.kernels.device import triton_on
from penstock.router.expert_budget import ExpertBudget
from penstock.workers.gpu_routing import knows
from penstock.workers.load_counter import LoadCounter
from penstock.workers.plan import RankPlan
from penstock.workers.runner import ModelRunner
from penstock.workers.sampler import accept
from penstock.workers.sampling_params import TokenSampling

from .static_steps import (
    STEPS,
    Padded,
    exact_counts,
    outputs_of,
    padded,
    prompts,
    runner_of,
)
from .tiny_engine import GREEDY, config_of

if TYPE_CHECKING:
    from penstock.cluster.transport.process_ranks import ProcessRanks

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="there `-m gpu` tests run the kernels as they are")


@pytest.fixture(scope="module")
def runner_for(checkpoint: Callable[[str], Path]) -> Callable[[str], ModelRunner]:
    made: dict[str, ModelRunner] = {}

    def make(model_type: str) -> ModelRunner:
        if model_type not in made:
            with triton_on("cpu"):
                made[model_type] = runner_of(checkpoint(model_type))
            made[model_type].step(prompts())
        return made[model_type]

    return make


BUDGETS = [
    None,
    "experts=4,scope=request",
    "experts=5,score=survival",
    "coverage=0.7,score=selected",
    "experts=3,score=probabilities,rest=truncation",
    "experts=4,scope=global",
    "max_ranks_per_row=1,experts=4",
]


@pytest.mark.parametrize(
    ("model_type", "step", "budget"),
    [
        *(("qwen3_moe", "mixed", budget) for budget in BUDGETS),
        ("qwen3_moe", "filtered", BUDGETS[1]),
        ("gpt_oss", "mixed", BUDGETS[1]),
        ("minimax_m2", "mixed", BUDGETS[2]),
        *(("deepseek_v3", "mixed", budget) for budget in BUDGETS),
        ("deepseek_v2", "mixed", BUDGETS[1]),
        ("gemma4_text", "mixed", BUDGETS[1]),
        ("kolibri1", "mixed", BUDGETS[1]),
    ],
)
def test_a_step_through_kernels_is_the_step(
    runner_for: Callable[[str], ModelRunner], model_type: str, step: str, budget: str | None
) -> None:
    runner = runner_for(model_type)
    assert bool(runner.padded.known_routers) == (model_type != "kolibri1"), "its logits are not what it selects by"
    parsed = None if budget is None else ExpertBudget.parse(budget)
    first = None if budget is None else 0
    requests = [
        replace(part, first_budgeted_row=first if len(part.token_ids) > 1 else None, reach=reach(len(part.token_ids)))
        for part in STEPS[step]
    ]
    plan = RankPlan(0, 1, requests=requests, budget=parsed)
    with torch.inference_mode():
        launched = runner._launched(plan)
        runner.padded.graphs.clear()
        with triton_on("cpu"):
            replayed = runner.padded.run(padded(plan, runner))
    torch.testing.assert_close(replayed.logits, launched.logits, rtol=1e-4, atol=1e-5)
    assert exact_counts(replayed.counts) == exact_counts(launched.counts)
    assert replayed.counts.weight_kept == pytest.approx(launched.counts.weight_kept, rel=1e-5)
    assert {key: kept.share for key, kept in replayed.kept_weights.items()} == pytest.approx(
        {key: kept.share for key, kept in launched.kept_weights.items()}, rel=1e-5
    )
    launches = {seam.replacement is not None for seam in runner.routers}
    assert launches == {bool(runner.padded.known_routers) and (parsed is None or knows(parsed))}
    assert (replayed.accepted is None) == (step == "filtered")
    if replayed.accepted is not None:
        assert replayed.tokens is not None
        ends = np.cumsum([part.num_sampled_rows for part in requests])[:-1]
        walks = zip(requests, np.split(replayed.tokens, ends), strict=True)
        assert replayed.accepted == [accept(part, tokens.tolist()) for part, tokens in walks]
    expected = runner.step(plan).token_ids
    with triton_on("cpu"):
        assert runner.step(padded(plan, runner)).token_ids == expected


def reach(num_rows: int) -> list[float]:
    return [0.9**row for row in range(num_rows)]


def test_one_sequence_serves_changing_budgets(runner_for: Callable[[str], ModelRunner]) -> None:
    runner = runner_for("qwen3_moe")
    runner.padded.graphs.clear()
    requests = [replace(part, first_budgeted_row=0) for part in STEPS["mixed"]]
    read = {}
    for number in (8, 2, 5, 2):
        plan = RankPlan(0, 1, requests=requests, budget=ExpertBudget(experts=number))
        with torch.inference_mode():
            expected = runner._launched(plan).counts.experts
            with triton_on("cpu"):
                found = runner.padded.run(padded(plan, runner)).counts.experts
        assert found == expected
        assert read.setdefault(number, found) == found
    assert len(runner.padded.graphs._steps) == 1
    assert sum(read[2]) < sum(read[5]) < sum(read[8])


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_the_device_follows_a_tree_to_its_second_branch(
    runner_for: Callable[[str], ModelRunner], model_type: str
) -> None:
    runner = runner_for(model_type)
    tree = replace(STEPS["mixed"][2], sampling=TokenSampling())
    tokens = list(tree.token_ids)
    for row, parent in ((2, 0), (4, 2)):  # drafts that are what the model chooses before them
        plan = RankPlan(0, 1, requests=[replace(tree, token_ids=tokens)])
        with torch.inference_mode():
            tokens[row] = int(runner._launched(plan).logits[parent].argmax())
    tokens[1] = (tokens[2] + 1) % 90
    plan = RankPlan(0, 1, requests=[STEPS["plain"][0], replace(tree, token_ids=tokens)])
    with torch.inference_mode(), triton_on("cpu"):
        accepted = runner.padded.run(padded(plan, runner)).accepted
    assert accepted is not None
    assert [path for _, path in accepted] == [[0], [0, 2, 4]]
    assert accepted[1][0][:2] == [tokens[2], tokens[4]]
    pools = {}
    for kernels in (False, True):
        runner.padded.graphs.clear()
        with triton_on("cpu" if kernels else "cuda"):
            assert runner.step(padded(plan, runner)).token_ids == [emitted for emitted, _ in accepted]
        pools[kernels] = [pool.clone() for pool in runner.cache.pools]
    slots = [runner.cache.tables[2][place // 4] * 4 + place % 4 for place in range(33)]  # and two accepted
    for moved, expected in zip(pools[True], pools[False], strict=True):
        torch.testing.assert_close(moved[slots], expected[slots], rtol=1e-4, atol=1e-5)


# --- how many operations, and nothing for the host to wait for ------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "num_ranks", "more"),
    [
        (None, 1, {}),
        ("experts=4,scope=request", 1, {}),
        ("experts=4,rank_balance=0.5", 8, {"triton.pack": 1, "all_to_all": 2, "triton.unpack": 1, "triton.add": 1}),
        ("experts=4,scope=global", 1, {"triton.route": 2}),
    ],
)
def test_a_block_of_experts_is_a_handful_of_launches(
    blind_runner: ModelRunner, budget: str | None, num_ranks: int, more: dict[str, int]
) -> None:
    found = step_launches.count(blind_runner, budget, num_ranks, kernels=True).operations
    experts = {"triton.group_pairs": 1, "triton.product": 2, "triton.combine": 1}
    block = {"aten.linear": 1, "triton.route": 1, **experts, **more}
    num_layers = len(blind_runner.experts.shards)
    assert found["experts"] == {name: number * num_layers for name, number in block.items()}
    assert found["step"]["triton.walk"] == found["step"]["triton.move"] == 1
    before = step_launches.count(blind_runner, budget, num_ranks, kernels=False).operations
    assert sum(before["experts"].values()) > (1 if budget is None else 3) * sum(found["experts"].values())


def test_groups_of_experts_take_no_launch_of_their_own(tmp_path: Path) -> None:
    step_launches.save_grouped(tmp_path)
    runner = step_launches.runner_without_numbers(tmp_path)
    for budget in (None, "experts=12,scope=request"):
        found = step_launches.count(runner, budget, 1, kernels=True).operations["experts"]
        assert found["triton.route"] == len(runner.experts.shards)
        assert not found.keys() & {"aten.topk", "aten.sort", "aten.sigmoid", "aten.scatter"}


def test_counting_what_experts_do_is_one_launch_more(
    blind_runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing for the host to wait for: no tensor of the step has numbers."""
    num_layers = len(blind_runner.experts.shards)
    before = step_launches.count(blind_runner, None, 8, kernels=True).operations["experts"]
    with triton_on("meta"):
        counter = LoadCounter(num_layers, blind_runner.experts.num_experts, torch.device("meta"))
    monkeypatch.setattr(blind_runner.experts, "_loads", counter)
    found = step_launches.count(blind_runner, None, 8, kernels=True).operations["experts"]
    assert found - before == {"triton.count_loads": num_layers}


@pytest.fixture(scope="module")
def blind_runner(checkpoint: Callable[[str], Path]) -> ModelRunner:
    return step_launches.runner_without_numbers(checkpoint("qwen3_moe"))


# --- between ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("budget", ["experts=4,scope=global"])
def test_ranks_exchange_packed_rows(
    checkpoint: Callable[[str], Path], budget: str | None, process_ranks: type[ProcessRanks]
) -> None:
    prompt = [[5, 17, 60, 33, 8], [3, 9, 3, 9, 3, 9, 3]]
    params = replace(GREEDY, max_tokens=8)
    config = replace(config_of(checkpoint("qwen3_moe"), 2), expert_budget=budget)
    results = []
    for command in ((), (sys.executable, str(Path(__file__).with_name("interpreting_rank.py")))):
        ranks = process_ranks(config, command)
        try:
            results.append(outputs_of(config, Padded(ranks), 3, params, prompt))
        finally:
            ranks.close()
    (expected, plain), (found, watched) = results
    assert found == expected
    for step, wanted in zip(watched.results, plain.results, strict=True):
        for rank, same in zip(step.ranks, wanted.ranks, strict=True):
            assert exact_counts(rank.counts) == exact_counts(same.counts)
            assert rank.counts.wire_bytes == same.counts.wire_bytes
            assert rank.collectives_crc == same.collectives_crc
            assert rank.counts.weight_kept == pytest.approx(same.counts.weight_kept, rel=1e-5)
    assert sum(sum(rank.counts.rows_sent) for step in watched.results for rank in step.ranks) > 0
