"""Routing and budgets in one kernel: the same as its reference, and as the router room's own choice."""

from __future__ import annotations

import pytest
import torch

from .triton_device import DEVICE, poisoned, random

from penstock.kernels.expert_routing import route  # isort: skip
from penstock.kernels.routing_rules import SCORES, KeptExperts, Router, route_reference
from penstock.router.budgeted_choice import LayerRanks, choose
from penstock.router.expert_budget import ExpertBudget
from penstock.router.routing import BudgetedRows, Routing

pytestmark = pytest.mark.usefixtures("poisoned")
__all__ = ["poisoned"]

E, RANKS = 16, 3
OWNER = torch.tensor([expert * 7 % E * RANKS // E for expert in range(E)], device=DEVICE)


def assert_same(result, expected):
    assert torch.equal(result.ids, expected.ids)
    assert result.weights.dtype == expected.weights.dtype
    tolerance = 1e-5 if result.weights.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(result.weights, expected.weights, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(result.kept, expected.kept, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("num_rows", "num_experts", "router"),
    [
        (1, 128, Router(8, dtype=torch.bfloat16)),
        (11, 6, Router(3, sigmoid=True, scale=2.5)),
        (5, 60, Router(4, normalise=False)),
        (9, 12, Router(2, by_logits=True)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_its_reference(num_rows, num_experts, router, dtype):
    # In steps of 1/32, bfloat16 holds them and many are equal
    logits = (random(num_rows, num_experts) * 32).round().div(32).to(dtype)
    bias = random(num_experts, seed=1) * 0.1 if router.sigmoid else None
    valid = torch.arange(num_rows, device=DEVICE) % 4 != 3
    for given in (None, valid):
        result = route(logits, router, bias, valid=given)
        assert_same(result, route_reference(logits, router, bias, valid=given))
    assert (result.ids[~valid] == num_experts).all()
    assert (result.ids[valid] < num_experts).all()


def own_choice(logits, router):
    affinities = logits.sigmoid() if router.sigmoid else logits.softmax(-1)
    scores = logits if router.by_logits else affinities
    return Routing(scores, affinities, *torch.topk(scores, router.top_k), in_groups=False)


def check_budget(budget, router, num_rows, num_groups, reduce=None):
    generator = torch.Generator().manual_seed(num_rows)
    logits = random(num_rows, E, seed=num_rows)
    budgeted, reach = torch.rand(num_rows, generator=generator) < 0.7, torch.rand(num_rows, generator=generator)
    valid = torch.arange(num_rows) != num_rows - 1
    budgeted, reach, valid = (budgeted & valid).to(DEVICE), reach.to(DEVICE), valid.to(DEVICE)
    groups = torch.arange(num_rows, device=DEVICE) * num_groups // num_rows
    kept = KeptExperts(
        score=budget.score,
        num_groups=num_groups,
        budgeted=budgeted,
        reach=reach,
        num_experts=None if budget.experts is None else torch.tensor([budget.experts], device=DEVICE),
        coverage=budget.coverage or 1.0,
        owner=OWNER if budget.is_per_owner else None,
        balance=budget.rank_balance,
        truncates=budget.rest == "truncation",
    )
    result = route(logits, router, None, kept, valid, reduce)
    assert_same(result, route_reference(logits, router, None, kept, valid, reduce))
    routing = own_choice(logits, router)
    rows = BudgetedRows(budgeted, valid, groups, num_groups, reach)
    limits, _, expected = choose(budget, routing, rows, LayerRanks(OWNER, RANKS, 0), reduce)
    if budget.rest == "truncation":
        expected = expected.masked_fill(~limits.allowed.gather(1, expected), E)
    assert torch.equal(result.ids, expected.masked_fill(~valid[:, None], E))
    torch.testing.assert_close(result.kept, limits.kept, rtol=1e-5, atol=1e-6)
    changed = (expected != routing.ids).any(dim=1)
    assert changed[budgeted].any(), "the budget must have changed something"
    assert not changed[~budgeted].any()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("router", "num_rows", "num_groups"),
    [(Router(3), 12, 1), (Router(3, sigmoid=True), 9, 3), (Router(2, by_logits=True), 12, 1)],
)
def test_budgets_are_those_of_the_router_room(score, router, num_rows, num_groups):
    check_budget(ExpertBudget(experts=5, score=score), router, num_rows, num_groups)


@pytest.mark.parametrize(
    "budget",
    [
        "coverage=0.6",
        "coverage=0.3,score=probabilities",
        "experts=6,scope=owner",
        "experts=5,rank_balance=0.5",
        "experts=5,rest=truncation",
        "coverage=0.5,rest=truncation",
    ],
)
@pytest.mark.parametrize("num_groups", [1, 4])
def test_every_list_that_it_knows_is_the_router_room_s(budget, num_groups):
    check_budget(ExpertBudget.parse(budget), Router(3), 12, num_groups)


@pytest.mark.parametrize("budget", ["experts=5,scope=global", "coverage=0.6,scope=global"])
def test_a_list_of_all_ranks_is_summed_once(budget):
    calls = []

    def reduce(worth):
        calls.append(tuple(worth.shape))
        worth += random(*worth.shape, seed=9).abs() * torch.tensor([0.3, 0.0], device=DEVICE).view(2, 1, 1)
        worth[1, 0, 3] += 2  # what rows of another rank have chosen

    check_budget(ExpertBudget.parse(budget), Router(3), 12, 1, reduce)
    assert calls == [(2, 1, E)] * 3


def test_no_rows_route_nowhere():
    routed = route(random(0, 8), Router(2))
    assert routed.ids.shape == routed.weights.shape == (0, 2)
