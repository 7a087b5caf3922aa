"""Routing and budgets in one kernel: the same as its reference, and as the router room's own choice."""

from __future__ import annotations

import pytest
import torch

from .triton_device import DEVICE, poisoned, random

from penstock.kernels.expert_routing import SCORES, KeptExperts, Router, route, route_reference  # isort: skip
from penstock.router.budgeted_choice import LayerRanks, choose
from penstock.router.expert_budget import ExpertBudget
from penstock.router.routing import BudgetedRows, Routing

pytestmark = pytest.mark.usefixtures("poisoned")
__all__ = ["poisoned"]


def budget_of(num_rows: int, num_kept: int, score: str, num_groups: int) -> KeptExperts:
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.arange(num_rows)
    return KeptExperts(
        num_kept,
        score,
        (rows * num_groups // num_rows).to(DEVICE),
        num_groups,
        (torch.rand(num_rows, generator=generator) < 0.7).to(DEVICE),
        (rows != num_rows - 1).to(DEVICE),
        torch.rand(num_rows, generator=generator).to(DEVICE),
    )


def assert_same(result, expected):
    assert torch.equal(result.ids, expected.ids)
    torch.testing.assert_close(result.weights, expected.weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.kept, expected.kept, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("num_rows", "num_experts", "router"),
    [
        (1, 128, Router(8)),
        (11, 6, Router(3, sigmoid=True, scale=2.5)),
        (5, 60, Router(4, normalise=False)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_its_reference(num_rows, num_experts, router, dtype):
    # In steps of 1/32, bfloat16 holds them and many are equal
    logits = (random(num_rows, num_experts) * 32).round().div(32).to(dtype)
    bias = random(num_experts, seed=1) * 0.1 if router.sigmoid else None
    assert_same(route(logits, router, bias, None), route_reference(logits, router, bias, None))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize(("num_rows", "num_groups"), [(12, 1), (9, 3)])
def test_budgets_are_those_of_the_router_room(score, sigmoid, num_rows, num_groups):
    num_experts, router = 16, Router(3, sigmoid=sigmoid)
    logits = random(num_rows, num_experts, seed=num_rows)
    budget = budget_of(num_rows, 5, score, num_groups)
    result = route(logits, router, None, budget)
    assert_same(result, route_reference(logits, router, None, budget))
    affinities = logits.sigmoid() if sigmoid else logits.softmax(-1)
    values, ids = torch.topk(affinities, 3)
    rows = BudgetedRows(budget.budgeted, budget.valid, budget.groups, num_groups, budget.reach)
    ranks = LayerRanks(torch.zeros(num_experts, dtype=torch.int64, device=DEVICE), 1, 0)
    routing = Routing(affinities, affinities, values, ids, in_groups=False)
    limits, _, expected = choose(ExpertBudget(experts=5, score=score), routing, rows, ranks)
    assert torch.equal(result.ids, expected)
    torch.testing.assert_close(result.kept[budget.budgeted], limits.kept[budget.budgeted], rtol=1e-5, atol=1e-6)
    assert not torch.equal(result.ids, ids), "the budget must have changed something"


def test_no_rows_route_nowhere():
    routed = route(random(0, 8), Router(2), None, None)
    assert routed.ids.shape == routed.weights.shape == (0, 2)
