"""Routing and budgets in one kernel: the same as its reference, and as the router room's own choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from .triton_device import DEVICE, poisoned, random

from penstock.kernels.expert_routing import route  # isort: skip
from penstock.kernels.routing_rules import SCORES, GroupLimit, KeptExperts, Router, outside, route_reference
from penstock.router.budgeted_choice import LayerRanks, choose
from penstock.router.expert_budget import ExpertBudget
from penstock.router.routing import BudgetedRows, Routing
from penstock.router.topk import Observed, RouterSeam

from .tiny_configs import settings_of

pytestmark = pytest.mark.usefixtures("poisoned")
__all__ = ["poisoned"]

E, RANKS = 16, 3
V3, V2 = GroupLimit(4, 1, 2), GroupLimit(4, 1, 1, 0.0)
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
    scales = random(num_experts, seed=2).abs().to(dtype)
    for given, by in ((None, None), (valid, None), (valid, scales)):
        result = route(logits, router, bias, valid=given, scales=by)
        assert_same(result, route_reference(logits, router, bias, valid=given, scales=by))
    assert (result.ids[~valid] == num_experts).all()
    assert (result.ids[valid] < num_experts).all()


# --- groups of experts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "ties", "-inf", "biased", "-inf biased"])
@pytest.mark.parametrize(
    ("num_groups", "num_kept", "num_experts", "top_k"),
    [
        (1, 1, 6, 2),
        (2, 1, 256, 7),
        (3, 2, 12, 2),
        (4, 3, 16, 8),
        (5, 3, 60, 1),
        (6, 1, 48, 8),
        (7, 4, 21, 5),
        (8, 3, 160, 6),
        (8, 4, 256, 8),
        (8, 7, 16, 3),
    ],
)
def test_groups_equal_their_reference(num_groups, num_kept, num_experts, top_k, kind):
    seed = num_groups * 10 + len(kind)
    logits = random(11, num_experts, seed=seed)
    bias = random(num_experts, seed=seed + 1) * 0.1 if "biased" in kind else None
    if kind == "ties":
        logits = logits.round()
    if "-inf" in kind:
        logits = logits.masked_fill(random(11, num_experts, seed=seed + 2) < -0.5, -torch.inf)
        if bias is not None:
            bias[::3] = -torch.inf
    valid = torch.arange(11, device=DEVICE) % 4 != 3
    for limit in (GroupLimit(num_groups, num_kept, 2), GroupLimit(num_groups, num_kept, 1, 0.0)):
        for router in (Router(top_k, limit=limit), Router(top_k, True, False, limit=limit)):
            by_logits = Router(top_k, by_logits=True, limit=limit) if kind == "-inf" else router
            result = route(logits, by_logits, bias, valid=valid)
            assert_same(result, route_reference(logits, by_logits, bias, valid=valid))
            assert (result.ids[~valid] == num_experts).all()
            distinct = result.ids[valid].sort(dim=1).values
            assert (distinct[:, 1:] > distinct[:, :-1]).all()


def observed(logits, router, bias) -> Observed:
    """What transformers' own router does that limits rows so: one whose logits are its rows."""
    from transformers import AutoConfig
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    name, kind = ("deepseek_v3", DeepseekV3TopkRouter) if router.sigmoid else ("deepseek_v2", DeepseekV2TopkRouter)
    size, limit = logits.shape[1], router.limit
    sizes = {"hidden_size": size, "n_routed_experts": size, "num_experts_per_tok": router.top_k}
    groups = {"n_group": limit.num_groups, "topk_group": limit.num_kept, "routed_scaling_factor": router.scale}
    module = kind(AutoConfig.for_model(name, **{**settings_of(name), **sizes, **groups})).to(DEVICE)
    with torch.inference_mode():
        module.weight.copy_(torch.eye(size))
        if bias is not None:
            module.e_score_correction_bias.copy_(bias)
        return RouterSeam(module, size, router.top_k).observe(logits)


@pytest.mark.parametrize(
    ("router", "num_experts"),
    [
        (Router(8, sigmoid=True, scale=2.5, limit=GroupLimit(8, 4, 2)), 256),
        (Router(6, normalise=False, scale=16.0, limit=GroupLimit(8, 3, 1, 0.0)), 160),
    ],
    ids=["V3", "V2"],
)
def test_groups_are_those_of_deepseek(router, num_experts):
    logits = random(9, num_experts, seed=4)
    bias = random(num_experts, seed=5) * 0.2 if router.sigmoid else None
    _, weights, ids = observed(logits, router, bias).result
    result = route(logits, router, bias)
    order, expected_order = result.ids.argsort(dim=1), ids.argsort(dim=1)
    assert torch.equal(result.ids.gather(1, order), ids.gather(1, expected_order))
    torch.testing.assert_close(result.weights.gather(1, order), weights.gather(1, expected_order))


# --- budgets ---------------------------------------------------------------------------------------------------------


def own_choice(logits, router, bias):
    if router.limit is not None:
        return observed(logits, router, bias).routing
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
    bias = random(E, seed=7) * 0.1 if router.limit and router.sigmoid else None
    result = route(logits, router, bias, kept, valid, reduce)
    assert_same(result, route_reference(logits, router, bias, kept, valid, reduce))
    routing = own_choice(logits, router, bias)
    rows = BudgetedRows(budgeted, valid, groups, num_groups, reach)
    limits, _, expected = choose(budget, routing, rows, LayerRanks(OWNER, RANKS, 0), reduce)
    if router.limit is not None:  # whose topk does not order what it chose
        order = routing.scores.gather(1, routing.ids).argsort(dim=1, descending=True)
        own = routing.ids.gather(1, order)
        expected = torch.where((expected == routing.ids).all(dim=1, keepdim=True), own, expected)
        routing = replace(routing, ids=own)
        is_outside = outside(routing.scores, routing.affinities).gather(1, expected)
        assert budget.rest == "truncation" or budget.coverage or is_outside.any(), "groups do not matter"
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
    [
        (Router(3), 12, 1),
        (Router(3, sigmoid=True), 9, 3),
        (Router(2, by_logits=True), 12, 1),
        (Router(3, sigmoid=True, limit=V3), 12, 3),
        (Router(3, normalise=False, limit=V2), 12, 1),
    ],
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
@pytest.mark.parametrize(
    ("router", "num_groups"),
    [
        (Router(3), 1),
        (Router(3), 4),
        (Router(3, sigmoid=True, limit=V3), 4),
        (Router(3, normalise=False, limit=V2), 1),
    ],
)
def test_every_list_that_it_knows_is_the_router_room_s(budget, router, num_groups):
    check_budget(ExpertBudget.parse(budget), router, 12, num_groups)


@pytest.mark.parametrize("router", [Router(3), Router(3, sigmoid=True, limit=V3)])
@pytest.mark.parametrize("budget", ["experts=5,scope=global", "coverage=0.6,scope=global"])
def test_a_list_of_all_ranks_is_summed_once(budget, router):
    calls = []

    def reduce(worth):
        calls.append(tuple(worth.shape))
        worth += random(*worth.shape, seed=9).abs() * torch.tensor([0.3, 0.0], device=DEVICE).view(2, 1, 1)
        worth[1, 0, 3] += 2  # what rows of another rank have chosen

    check_budget(ExpertBudget.parse(budget), router, 12, 1, reduce)
    assert calls == [(2, 1, E)] * 3


def test_no_rows_route_nowhere():
    routed = route(random(0, 8), Router(2))
    assert routed.ids.shape == routed.weights.shape == (0, 2)
