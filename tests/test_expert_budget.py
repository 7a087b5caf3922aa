from __future__ import annotations

import pytest

from penstock.router.expert_budget import ExpertBudget


@pytest.mark.parametrize(
    "text",
    [
        "experts=20",
        "coverage=0.9",
        "experts=8,score=probabilities,rest=truncation,scope=global",
        "coverage=0.95,score=survival,scope=request,protect_first_row=true",
        "max_ranks_per_row=2,min_rank_share=0.1",
    ],
)
def test_what_is_written_is_read(text: str) -> None:
    budget = ExpertBudget.parse(text)
    assert str(budget) == text
    assert ExpertBudget.parse(str(budget)) == budget


def test_spaces_and_order_do_not_matter() -> None:
    assert ExpertBudget.parse(" scope=owner, experts=6 ") == ExpertBudget(experts=6, scope="owner")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected experts, coverage, max_ranks_per_row or min_rank_share"),
        ("score=selected", "expected experts, coverage"),
        ("20", "expected name=value with a name of experts, coverage, score"),
        ("expert=20", "got 'expert=20'"),
        ("experts=many", "'many' is no value of experts"),
        ("experts=2.5", "'2.5' is no value of experts"),
        ("protect_first_row=yes,experts=4", "'yes' is no value of protect_first_row"),
        ("experts=8,experts=9", "experts is given twice"),
        ("experts=8,coverage=0.5", "experts and coverage exclude each other"),
        ("coverage=0", r"coverage 0.0 is not in \(0, 1\]"),
        ("coverage=1.01", r"coverage 1.01 is not in \(0, 1\]"),
        ("coverage=nan", r"coverage nan is not in \(0, 1\]"),
        ("experts=8,score=best", "score 'best' is not one of probabilities, selected, squared, survival"),
        ("experts=8,rest=drop", "rest 'drop' is not one of substitution, truncation"),
        ("experts=8,scope=node", "scope 'node' is not one of request, source, owner, global"),
        ("max_ranks_per_row=0", "max_ranks_per_row 0 is not at least 1"),
        ("min_rank_share=1", r"min_rank_share 1.0 is not in \[0, 1\)"),
        ("experts=8,min_rank_share=-0.1", r"min_rank_share -0.1 is not in \[0, 1\)"),
        ("coverage=0.9,scope=owner", "coverage has no scope owner"),
        ("experts=8,rank_balance=1", r"rank_balance 1.0 is not in \[0, 1\)"),
        ("coverage=0.9,rank_balance=0.5", "rank_balance goes with experts"),
        ("experts=8,scope=owner,rank_balance=0.5", "rank_balance goes with experts, and with another scope than owner"),
    ],
)
def test_bad_input_names_the_field_and_the_range(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^expert_budget: .*{message}"):
        ExpertBudget.parse(text)


@pytest.mark.parametrize("experts", [3, 33])
def test_a_number_of_experts_that_the_model_cannot_keep_to_is_refused(experts: int) -> None:
    with pytest.raises(ValueError, match=rf"^expert_budget: experts {experts} is not in \[4, 32\]"):
        ExpertBudget(experts=experts).check(32, 4, steerable=True)
    ExpertBudget(experts=4).check(32, 4, steerable=True)
    ExpertBudget(experts=32).check(32, 4, steerable=True)


@pytest.mark.parametrize(
    "budget", [ExpertBudget(experts=8), ExpertBudget(experts=8, rest="truncation", score="probabilities")]
)
def test_a_router_without_top_k_can_only_be_truncated(budget: ExpertBudget) -> None:
    with pytest.raises(ValueError, match="choose rest truncation"):
        budget.check(16, 2, steerable=False)
    ExpertBudget(experts=8, rest="truncation").check(16, 2, steerable=False)


@pytest.mark.parametrize(
    ("budget", "num_ranks", "is_void"),
    [
        (ExpertBudget(experts=32), 1, True),
        (ExpertBudget(experts=31), 1, False),
        (ExpertBudget(coverage=1.0), 4, True),
        (ExpertBudget(coverage=0.999), 4, False),
        (ExpertBudget(max_ranks_per_row=1), 1, True),
        (ExpertBudget(max_ranks_per_row=1), 2, True),
        (ExpertBudget(max_ranks_per_row=1), 3, False),
        (ExpertBudget(min_rank_share=0.1), 2, False),
        (ExpertBudget(experts=32, min_rank_share=0.1), 1, True),
    ],
)
def test_it_is_known_what_changes_nothing(budget: ExpertBudget, num_ranks: int, is_void: bool) -> None:
    assert budget.is_void(32, num_ranks) is is_void
