"""What a budget does to answers, as measured: reference, agreement, perplexity, exact match, experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from penstock.cluster.calibration.calibrate import calibrate, default_budgets
from penstock.cluster.calibration.profile import Conditions
from penstock.cluster.calibration.quality import (
    Question,
    Reference,
    measure_budget,
    measure_reference,
    next_token_agreement,
    perplexity_ratio,
)
from penstock.cluster.calibration.teacher_forcing import TextScores, TokenScore
from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.ranks import LocalRanks, make_runner
from penstock.router.expert_budget import ExpertBudget
from penstock.workers.model_info import ModelInfo

from .tiny_engine import PROMPTS, config_of

RUN = {"draft_len": 3, "max_tokens": 16}
CONDITIONS = Conditions(
    **RUN,
    drafter="ngram",
    max_num_seqs=32,
    num_ranks=1,
    placement_sha256=None,
    dtype="float32",
    data="d.jsonl",
    data_sha256="0",
    num_records=len(PROMPTS),
)


def decode(token_ids: Sequence[int]) -> str:
    return " ".join(map(str, token_ids))


@pytest.fixture(scope="module")
def tiny(checkpoint: Callable[[str], Path]) -> tuple[EngineConfig, LocalRanks]:
    config = config_of(checkpoint("qwen3_moe"))
    return config, LocalRanks(make_runner(config, 0))


@pytest.fixture(scope="module")
def reference(tiny: tuple[EngineConfig, LocalRanks]) -> Reference:
    return measure_reference(*tiny, PROMPTS, **RUN)


@pytest.fixture(scope="module")
def questions(reference: Reference) -> list[Question]:
    """All but the first with the answer that the model gives without a budget, the last with another one."""
    answers = [None, *map(decode, reference.answers.token_ids[1:-1]), "another"]
    return [Question(tuple(prompt), answer) for prompt, answer in zip(PROMPTS, answers, strict=True)]


@pytest.mark.parametrize("budget", ["experts=8", "coverage=1,scope=request"])
def test_a_budget_of_everything_loses_nothing(
    tiny: tuple[EngineConfig, LocalRanks], reference: Reference, questions: list[Question], budget: str
) -> None:
    found = measure_budget(*tiny, questions, reference, ExpertBudget.parse(budget), decode, **RUN)
    assert found.matches is not None
    assert (found.matches.num_pairs, found.matches.reference_share, found.matches.loss) == (4, 0.75, 0)
    assert found.agreement == 1
    assert found.num_tokens == sum(len(token_ids) - 1 for token_ids in reference.answers.token_ids)
    assert found.perplexity_ratio == pytest.approx(1, abs=1e-5)
    assert found.experts_per_layer == reference.experts_per_layer > 3
    assert found.tokens_per_step == reference.answers.tokens_per_step
    assert found.kept_weight is None


def test_a_small_budget_costs_something(
    tiny: tuple[EngineConfig, LocalRanks], reference: Reference, questions: list[Question]
) -> None:
    done: list[int] = []
    budget = ExpertBudget(experts=2, scope="request")
    found = measure_budget(*tiny, questions, reference, budget, decode, on_progress=done.append, **RUN)
    assert found.matches is not None
    assert found.matches.num_lost > 0
    assert found.agreement < 1 < found.perplexity_ratio
    assert found.experts_per_layer == 2
    assert found.kept_weight is not None
    assert found.kept_weight < 1
    assert sum(done) == 2 * len(questions)
    blind = [Question(question.prompt) for question in questions]
    assert measure_budget(*tiny, blind, reference, budget, decode, **RUN).matches is None


def test_agreement_and_perplexity_by_hand() -> None:
    one = TextScores([{1: TokenScore(-1.0, 5), 2: TokenScore(-2.0, 6)}, {1: TokenScore(-0.5, 7)}])
    other = TextScores([{1: TokenScore(-1.5, 5), 2: TokenScore(-2.0, 9)}, {1: TokenScore(-1.1, 7)}])
    assert next_token_agreement(one, other) == (pytest.approx(2 / 3), 3)
    assert perplexity_ratio(one, other) == pytest.approx(math.exp((0.5 + 0 + 0.6) / 3))


def test_a_calibration_says_what_was_measured_of_each_budget(
    tiny: tuple[EngineConfig, LocalRanks], questions: list[Question]
) -> None:
    seen: dict[str, int] = {}

    def count(what: str, done: int) -> None:
        seen[what] = seen.get(what, 0) + done

    budgets = [ExpertBudget(experts=2, scope="request"), ExpertBudget(coverage=0.7)]
    small, wide = calibrate(*tiny, questions, budgets, decode, CONDITIONS, count)
    assert [str(small.parsed), str(wide.parsed)] == ["experts=2,scope=request", "coverage=0.7"]
    assert seen == dict.fromkeys(["no budget", str(small.parsed), str(wide.parsed)], 2 * len(questions))
    assert small.conditions == CONDITIONS
    assert (small.num_pairs, small.reference_exact_match) == (4, 0.75)
    assert small.exact_match_loss == pytest.approx(0.75 - (small.exact_match or 0))
    assert small.experts_saved > wide.experts_saved > 0
    assert small.key != wide.key


def test_a_budget_that_the_model_cannot_keep_to_is_refused_before_anything_runs(
    tiny: tuple[EngineConfig, LocalRanks], questions: list[Question]
) -> None:
    budgets = [ExpertBudget(coverage=0.7), ExpertBudget(experts=1)]
    ran: list[str] = []
    with pytest.raises(ValueError, match=r"^expert_budget: experts 1 is not in \[2, 8\]"):
        list(calibrate(*tiny, questions, budgets, decode, CONDITIONS, lambda what, done: ran.append(what)))
    assert not ran


@pytest.mark.parametrize(
    ("num_experts", "top_k", "steerable", "sizes"),
    [(32, 4, True, [24, 20, 16, 12, 8]), (128, 8, True, [96, 80, 64, 48, 32, 16]), (8, 2, False, [6, 5, 4])],
)
def test_the_grid_goes_from_most_experts_to_twice_what_a_row_uses(
    num_experts: int, top_k: int, steerable: bool, sizes: list[int]
) -> None:
    fields = dict.fromkeys(ModelInfo.__dataclass_fields__, 0)
    fields |= {"num_experts": num_experts, "num_experts_per_tok": top_k, "steerable": steerable}
    budgets = default_budgets(ModelInfo(**fields))  # type: ignore[arg-type]
    assert [budget.experts for budget in budgets if budget.experts] == sizes
    assert [budget.coverage for budget in budgets if budget.coverage] == [0.98, 0.95, 0.9]
    for budget in budgets:
        budget.check(num_experts, top_k, steerable=steerable)
        assert budget.scope == "request"
