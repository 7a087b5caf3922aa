"""An engine whose verifications keep to a budget of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.layer_totals import COUNTS
from penstock.cluster.engine.ranks import LocalRanks, Ranks, make_runner
from penstock.cluster.speculation.fixed import FixedController
from penstock.cluster.speculation.observation import StepObservation
from penstock.cluster.speculation.options import SpeculationOptions
from penstock.router.expert_budget import ExpertBudget
from penstock.workers.plan import StepPlan

from .tiny_engine import GREEDY, PROMPTS, FailingRanks, config_of, drain, generate

BUDGET = "experts=3,scope=request"
EXACT = SpeculationOptions(expert_budget="off")


@pytest.fixture(scope="module")
def tiny(checkpoint: Callable[[str], Path]) -> tuple[EngineConfig, LocalRanks]:
    config = config_of(checkpoint("qwen3_moe"), draft_len=3)
    return config, LocalRanks(make_runner(config, 0))


def budgeted(config: EngineConfig, budget: str = BUDGET) -> EngineConfig:
    return replace(config, expert_budget=budget)


def never(call: int) -> bool:
    return False


def engine_of(config: EngineConfig, ranks: Ranks, fails: Callable[[int], bool] = never) -> tuple[Engine, FailingRanks]:
    failing = FailingRanks(ranks, fails)
    return Engine(config, failing), failing


def budgeted_parts(plans: list[StepPlan]) -> list[tuple[int, int | None, int, int]]:
    """Of every part of every plan: its request, first budgeted row, first sampled row and number of rows."""
    return [
        (part.request_id, part.first_budgeted_row, part.first_sampled_row, len(part.token_ids))
        for plan in plans
        for rank in plan.ranks
        for part in rank.requests
    ]


def test_only_rows_that_verify_drafts_keep_to_it(tiny: tuple[EngineConfig, LocalRanks]) -> None:
    config, ranks = tiny
    for protect in (False, True):
        budget = f"{BUDGET},protect_first_row=true" if protect else BUDGET
        engine, failing = engine_of(budgeted(config, budget), ranks)
        generate(engine, PROMPTS, GREEDY)
        parts = budgeted_parts(failing.plans)
        verifying = [part for part in parts if part[3] - part[2] > 1]
        assert verifying
        assert all(part[1] == part[2] + protect for part in verifying)
        assert all(part[1] is None for part in parts if part not in verifying)
        for plan in failing.plans:
            acts = any(part.first_budgeted_row is not None for rank in plan.ranks for part in rank.requests)
            assert all((rank.budget is not None) == acts for rank in plan.ranks)


def test_a_verification_reads_no_more_experts_than_it_allows(tiny: tuple[EngineConfig, LocalRanks]) -> None:
    config, ranks = tiny
    most = {}
    for budget in (None, "experts=3"):
        engine, failing = engine_of(replace(config, expert_budget=budget), ranks)
        generate(engine, PROMPTS[1:2], GREEDY)  # alone: every decoding step verifies it and nothing else
        steps = zip(failing.plans, failing.results, strict=True)
        verifications = [result for plan, result in steps if plan.ranks[0].requests[0].num_sampled_rows > 1]
        most[budget] = max(max(result.ranks[0].counts.experts) for result in verifications)
    assert most["experts=3"] == 3 < most[None]


def test_requests_say_what_it_left_them_and_may_refuse_it(tiny: tuple[EngineConfig, LocalRanks]) -> None:
    config, ranks = tiny
    exact, _ = engine_of(config, ranks)
    exact.add_request("plain", PROMPTS[1], GREEDY)
    wanted = drain(exact)["plain"]
    engine, failing = engine_of(budgeted(config), ranks)
    engine.add_request("exact", PROMPTS[1], GREEDY, EXACT)
    engine.add_request("lossy", PROMPTS[1], GREEDY)
    published = drain(engine)
    assert published["exact"] == wanted
    stats = {name: output.stats for name, output in published.ended.items()}
    assert stats["exact"] is not None
    assert stats["lossy"] is not None
    assert (stats["exact"].num_budgeted_rows, stats["exact"].kept_weight) == (0, None)
    assert stats["exact"].num_draft_tokens > 0
    rows = sum(part[3] - part[1] for part in budgeted_parts(failing.plans) if part[1] is not None)
    assert stats["lossy"].num_budgeted_rows == rows > 0
    assert stats["lossy"].kept_weight is not None
    assert 0 < stats["lossy"].kept_weight < 1
    assert all(part[0] == 1 for part in budgeted_parts(failing.plans) if part[1] is not None)


def test_lists_of_ones_own_make_an_answer_independent_of_batch_mates(tiny: tuple[EngineConfig, LocalRanks]) -> None:
    config, ranks = tiny
    together = generate(engine_of(budgeted(config), ranks)[0], PROMPTS, GREEDY)
    alone = [generate(engine_of(budgeted(config), ranks)[0], [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert together == alone
    assert together != generate(engine_of(config, ranks)[0], PROMPTS, GREEDY), "a budget of 3 of 8 must tell"


@pytest.mark.parametrize("score", ["selected", "survival", "probabilities"])
def test_a_failed_step_neither_loses_nor_repeats_a_token(tiny: tuple[EngineConfig, LocalRanks], score: str) -> None:
    config, ranks = tiny
    config = budgeted(config, f"{BUDGET},score={score}")
    wanted = generate(engine_of(config, ranks)[0], PROMPTS, GREEDY)
    engine, failing = engine_of(config, ranks, lambda call: call % 3 == 0)
    assert generate(engine, PROMPTS, GREEDY) == wanted
    assert len(failing.recovered) > 3
    reach = [part.reach for plan in failing.plans for rank in plan.ranks for part in rank.requests]
    assert any(reach) == (score == "survival")
    assert all(values == sorted(values, reverse=True) and values[0] == 1.0 for values in reach if values)


class LevelsInTurn(FixedController):
    """Keeps step after step to another of two levels, or to none, and notes what it is told."""

    def __init__(self) -> None:
        super().__init__(3)
        self.observed: list[StepObservation] = []

    def budget_level(self) -> int | None:
        return (None, 0, 1)[len(self.observed) % 3]

    def observe(self, step: StepObservation) -> None:
        self.observed.append(step)


def test_a_controller_chooses_one_level_a_step_for_all_ranks(tiny: tuple[EngineConfig, LocalRanks]) -> None:
    config, ranks = tiny
    levels = ("experts=3,scope=request,protect_first_row=true", BUDGET)
    config = replace(config, draft_len=None, expert_budget=("experts=8", *levels))
    failing, controller = FailingRanks(ranks, lambda call: call % 4 == 0), LevelsInTurn()
    engine = Engine(config, failing, controller=controller)
    engine.add_request("exact", PROMPTS[1], GREEDY, EXACT)
    generate(engine, PROMPTS, GREEDY)
    committed = [plan for call, plan in enumerate(failing.plans, start=1) if call % 4]
    wanted = [None, *map(ExpertBudget.parse, levels)]
    used = set()
    for number, (plan, step) in enumerate(zip(committed, controller.observed, strict=True)):
        (budget,) = {rank.budget for rank in plan.ranks}
        parts = [part for rank in plan.ranks for part in rank.requests if part.first_budgeted_row is not None]
        assert budget == (wanted[number % 3] if parts else None), "one that can change nothing is no level"
        assert step.budget_level == (number % 3 - 1 if budget else None)
        assert step.num_budgeted_rows == sum(part.num_sampled_rows for part in parts)
        assert all(part.first_budgeted_row == part.first_sampled_row + (number % 3 == 1) for part in parts)
        used.add(step.budget_level)
    assert used == {None, 0, 1}
    stats = engine.stats()
    assert stats.budget_steps == {
        str(wanted[n + 1]): sum(s.budget_level == n for s in controller.observed) for n in (0, 1)
    }
    for name in COUNTS:
        found = [getattr(rank.counts, name) for result in failing.results for rank in result.ranks]
        assert stats.by_layer[name] == pytest.approx([sum(layer) for layer in zip(*filter(None, found), strict=True)])
        assert sum(stats.by_rank[name]) == pytest.approx(sum(map(sum, found)))
    assert all(part[0] != 0 for part in budgeted_parts(failing.plans) if part[1] is not None)


def test_drafts_of_a_prediction_are_exact(tiny: tuple[EngineConfig, LocalRanks]) -> None:
    config, ranks = tiny
    exact, _ = engine_of(config, ranks)
    exact.add_request("plain", PROMPTS[0], GREEDY)
    wanted = drain(exact)["plain"]
    engine, failing = engine_of(budgeted(config), ranks)
    engine.add_request("predicted", PROMPTS[0], GREEDY, SpeculationOptions(prediction_token_ids=tuple(wanted)))
    published = drain(engine)
    assert published["predicted"] == wanted
    stats = published.ended["predicted"].stats
    assert stats is not None
    assert stats.num_accepted_prediction_tokens > 10
    assert not any(part[1] is not None for part in budgeted_parts(failing.plans)[:4])


def test_several_levels_need_names(tiny: tuple[EngineConfig, LocalRanks]) -> None:
    config, ranks = tiny
    with pytest.raises(ValueError, match=r"^expert_budget: auto is for what reads the model's profile"):
        engine_of(budgeted(config, "auto"), ranks)


@pytest.mark.parametrize("budget", ["experts=8", "coverage=1", "experts=8,max_ranks_per_row=1"])
def test_a_budget_that_allows_everything_is_not_sent(tiny: tuple[EngineConfig, LocalRanks], budget: str) -> None:
    config, ranks = tiny
    engine, failing = engine_of(budgeted(config, budget), ranks)
    generate(engine, PROMPTS[1:2], GREEDY)
    assert all(rank.budget is None for plan in failing.plans for rank in plan.ranks)


def test_a_budget_below_top_k_is_refused(tiny: tuple[EngineConfig, LocalRanks]) -> None:
    config, ranks = tiny
    with pytest.raises(ValueError, match=r"^expert_budget: experts 1 is not in \[2, 8\]"):
        engine_of(budgeted(config, "experts=1"), ranks)
    with pytest.raises(ValueError, match=r"^expert_budget: 'few' is no value of experts"):
        budgeted(config, "experts=few")
