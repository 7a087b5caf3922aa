"""Budgets against formulas written by hand: one row, one expert at a time, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from penstock.router.budgeted_choice import LayerRanks, limit, substitute
from penstock.router.budgeted_selection import BudgetedSelection
from penstock.router.expert_budget import RESTS, SCOPES, SCORES, ExpertBudget
from penstock.router.routing import BudgetedRows, Routing
from penstock.router.topk import RouterSeam
from penstock.workers.loader import _moe_modules

E, K, T = 8, 2, 6
ONE_RANK = LayerRanks(torch.zeros(E, dtype=torch.int64), 1, 0)
FOUR_RANKS = LayerRanks(torch.arange(E) // 2, 4, 1)


def softmax_routing(num_rows: int = T, seed: int = 0) -> Routing:
    logits = torch.randn(num_rows, E, generator=torch.Generator().manual_seed(seed)) * 2
    scores = logits.softmax(-1)
    return Routing(scores, scores, *scores.topk(K))


def rows_of(budgeted: list[bool], groups: list[int] | None = None, reach: list[float] | None = None) -> BudgetedRows:
    groups = groups or [0] * len(budgeted)
    reach = reach or [1.0] * len(budgeted)
    return BudgetedRows(
        torch.tensor(budgeted), None, torch.tensor(groups), max(groups) + 1, torch.tensor(reach, dtype=torch.float32)
    )


def shares_by_hand(routing: Routing, row: int) -> dict[int, float]:
    weights = {int(e): float(routing.affinities[row, e]) for e in routing.ids[row]}
    total = sum(weights.values())
    return {expert: weight / total for expert, weight in weights.items()}


def importance_by_hand(score: str, routing: Routing, rows: BudgetedRows, group: int) -> list[float]:
    worth = [0.0] * E
    for row in range(len(routing.ids)):
        if not rows.budgeted[row] or rows.groups[row] != group:
            continue
        if score == "probabilities":
            total = float(routing.affinities[row].sum())
            for expert in range(E):
                worth[expert] += float(routing.affinities[row, expert]) / total
        else:
            factor = float(rows.reach[row]) if score == "survival" else 1.0
            for expert, share in shares_by_hand(routing, row).items():
                worth[expert] += factor * (share if score == "selected" else share**2)
    return worth


def loaded_by_hand(routing: Routing, rows: BudgetedRows, group: int) -> set[int]:
    return {
        int(expert)
        for row in range(len(routing.ids))
        if not rows.budgeted[row] and rows.groups[row] == group
        for expert in routing.ids[row]
    }


def shortlist_by_hand(worth: list[float], loaded: set[int], num_experts: int) -> set[int]:
    return loaded | set(sorted(range(E), key=lambda e: -worth[e])[:num_experts])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("num_experts", [2, 3, 5, 8])
def test_the_best_experts_are_kept_and_those_loaded_anyway(score: str, num_experts: int) -> None:
    routing = softmax_routing()
    rows = rows_of([False, True, True, True, False, True], reach=[1.0, 1.0, 0.7, 0.2, 1.0, 0.05])
    limits = limit(ExpertBudget(experts=num_experts, score=score), routing, rows, ONE_RANK)
    expected = shortlist_by_hand(
        importance_by_hand(score, routing, rows, 0), loaded_by_hand(routing, rows, 0), num_experts
    )
    for row in range(T):
        allowed = set(range(E)) if not rows.budgeted[row] else expected
        assert set(limits.allowed[row].nonzero()[:, 0].tolist()) == allowed
        kept = sum(share for expert, share in shares_by_hand(routing, row).items() if expert in allowed)
        assert float(limits.kept[row]) == pytest.approx(kept, abs=1e-6)


@pytest.mark.parametrize(("score", "kept"), [("selected", {1, 3}), ("squared", {0, 3}), ("survival", {0, 2})])
def test_scores_disagree_on_who_matters(score: str, kept: set[int]) -> None:
    scores = torch.zeros(3, E)
    scores[0, 0], scores[0, 2] = 0.6, 0.4  # one row leans on 0; two rows touch 1
    scores[1:, 1], scores[1:, 3] = 0.35, 0.65
    routing = Routing(scores, scores, *scores.topk(K))
    rows = rows_of([True] * 3, reach=[1.0, 0.1, 0.1])
    limits = limit(ExpertBudget(experts=2, score=score), routing, rows, ONE_RANK)
    assert set(limits.allowed[0].nonzero()[:, 0].tolist()) == kept


@pytest.mark.parametrize("scope", ["source", "owner"])
def test_batch_mates_that_load_experts_take_nobodys_place(scope: str) -> None:
    routing = softmax_routing(16)
    budget = ExpertBudget(experts=4, scope=scope)
    verifying = [True] * T + [False] * 10
    alone = Routing(*(tensor[:T] for tensor in (routing.scores, routing.affinities, routing.values, routing.ids)))
    before = limit(budget, alone, rows_of([True] * T), FOUR_RANKS)
    after = limit(budget, routing, rows_of(verifying), FOUR_RANKS)
    assert bool((after.allowed[:T] | ~before.allowed).all())
    assert bool((after.kept[:T] >= before.kept - 1e-6).all())
    assert bool((after.kept[:T] > before.kept + 1e-3).any())


def test_no_row_is_left_without_its_best_rank() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.55, 0.0, 0.45, 0.0]])
    routing = Routing(scores, scores, *scores.topk(K))
    limits = limit(ExpertBudget(min_rank_share=0.9), routing, rows_of([True]), FOUR_RANKS)
    assert limits.allowed[0].nonzero()[:, 0].tolist() == [2, 3, 4, 5], "home, and the rank of most weight"


def test_ties_send_no_row_to_more_ranks_than_allowed() -> None:
    scores = torch.full((1, 64), 1 / 64)
    ids = torch.tensor([[5, 9, 33]])
    ranks = LayerRanks(torch.arange(64), 64, 0)
    routing = Routing(scores, scores, scores.gather(1, ids), ids)
    budget = ExpertBudget(max_ranks_per_row=2, rest="truncation")
    assert int(limit(budget, routing, rows_of([True]), ranks).allowed[0, 1:].sum()) == 2


@pytest.mark.parametrize(("balance", "ranks"), [(0.0, ONE_RANK), (0.5, FOUR_RANKS)])
def test_requests_with_lists_of_their_own_do_not_see_each_other(balance: float, ranks: LayerRanks) -> None:
    routing = softmax_routing()
    budget = ExpertBudget(experts=3, scope="request", rank_balance=balance)
    together = limit(budget, routing, rows_of([True] * T, [0, 0, 0, 1, 1, 1]), ranks)
    for part in (slice(0, 3), slice(3, 6)):
        alone = Routing(*(tensor[part] for tensor in (routing.scores, routing.affinities, routing.values, routing.ids)))
        expected = limit(budget, alone, rows_of([True] * 3), ranks)
        assert torch.equal(together.allowed[part], expected.allowed)
        assert torch.equal(together.kept[part], expected.kept)


@pytest.mark.parametrize("coverage", [0.05, 0.5, 0.8, 0.95])
def test_the_fewest_experts_that_cover_a_share_are_kept(coverage: float) -> None:
    routing, rows = softmax_routing(), rows_of([True] * T)
    limits = limit(ExpertBudget(coverage=coverage), routing, rows, ONE_RANK)
    worth = importance_by_hand("squared", routing, rows, 0)
    ranked = sorted(range(E), key=lambda e: -worth[e])
    number = next(n for n in range(1, E + 1) if sum(worth[e] for e in ranked[:n]) >= coverage * sum(worth) - 1e-6)
    assert set(limits.allowed[0].nonzero()[:, 0].tolist()) == set(ranked[: max(number, K)])


@pytest.mark.parametrize("balance", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("num_experts", [4, 5, 6])
def test_experts_beyond_a_ranks_part_are_worth_less(num_experts: int, balance: float) -> None:
    routing, rows = softmax_routing(12), rows_of([True] * 12)
    two_ranks = LayerRanks(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 2, 0)
    limits = limit(ExpertBudget(experts=num_experts, rank_balance=balance), routing, rows, two_ranks)
    worth = importance_by_hand("squared", routing, rows, 0)
    ranked = sorted(range(E), key=lambda e: -worth[e])
    part = math.ceil(num_experts / 2)
    within = [e for rank in range(2) for e in [e for e in ranked if e // 4 == rank][:part]]
    by_discount = sorted(range(E), key=lambda e: -worth[e] * (1 if e in within else 1 - balance))
    kept = set(limits.allowed[0].nonzero()[:, 0].tolist())
    assert kept == set(by_discount[:num_experts])
    if balance == 0.99:
        assert max(sum(e // 4 == rank for e in kept) for rank in range(2)) == part


@pytest.mark.parametrize("num_experts", [4, 5, 6])
def test_owners_keep_equal_parts(num_experts: int) -> None:
    routing, rows = softmax_routing(12), rows_of([True] * 12)
    limits = limit(ExpertBudget(experts=num_experts, scope="owner"), routing, rows, FOUR_RANKS)
    worth = importance_by_hand("squared", routing, rows, 0)
    each = math.ceil(num_experts * 2 / E)
    expected = {
        expert for rank in range(4) for expert in sorted((2 * rank, 2 * rank + 1), key=lambda e: -worth[e])[:each]
    }
    assert set(limits.allowed[0].nonzero()[:, 0].tolist()) == expected


def test_all_ranks_keep_the_same_at_scope_global() -> None:
    budget = ExpertBudget(experts=3, scope="global")
    routings = [softmax_routing(seed=rank) for rank in range(2)]
    rows = [rows_of([True] * T), rows_of([False, False, True, True, True, True])]
    partial: list[torch.Tensor] = []
    for routing, own in zip(routings, rows, strict=True):
        limit(budget, routing, own, ONE_RANK, partial.append)  # what each rank contributes
    total = partial[0] + partial[1]
    limits = [
        limit(budget, routing, own, ONE_RANK, lambda tensor: tensor.copy_(total))
        for routing, own in zip(routings, rows, strict=True)
    ]
    loaded = loaded_by_hand(routings[1], rows[1], 0)
    worths = [importance_by_hand("squared", *pair, 0) for pair in zip(routings, rows, strict=True)]
    expected = shortlist_by_hand([a + b for a, b in zip(*worths, strict=True)], loaded, 3)
    for found, own in zip(limits, rows, strict=True):
        assert set(found.allowed[own.budgeted][0].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("max_ranks", [1, 2])
@pytest.mark.parametrize("min_share", [0.0, 0.3])
def test_rows_visit_the_ranks_with_most_of_their_weight(max_ranks: int, min_share: float) -> None:
    scores = torch.randn(40, E, generator=torch.Generator().manual_seed(3)).mul(2).softmax(-1)
    routing = Routing(scores, scores, *scores.topk(4))
    budget = ExpertBudget(max_ranks_per_row=max_ranks, min_rank_share=min_share)
    limits = limit(budget, routing, rows_of([True] * 40), FOUR_RANKS)
    owner, home = FOUR_RANKS.owner.tolist(), FOUR_RANKS.home
    for row in range(40):
        weight = dict.fromkeys(range(4), 0.0)
        for expert, share in shares_by_hand(routing, row).items():
            weight[owner[expert]] += share
        best = max(weight, key=lambda rank: weight[rank])
        others = sorted((rank for rank in weight if rank != home), key=lambda rank: -weight[rank])[:max_ranks]
        wanted = {rank for rank in others if weight[rank] > 0 and weight[rank] >= min_share} | {home, best}
        assert {owner[e] for e in limits.allowed[row].nonzero()[:, 0].tolist()} == wanted
        assert len(wanted - {home}) <= max_ranks
    ids = substitute(routing, limits.allowed)[1]
    used = limits.allowed.gather(1, ids)
    visited = [
        {owner[e] for e, ok in zip(*pair, strict=True) if ok} - {home}
        for pair in zip(ids.tolist(), used.tolist(), strict=True)
    ]
    assert max(map(len, visited)) == max_ranks


def router_of(directory: Path) -> tuple[torch.nn.Module, int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return _moe_modules(model)[1][-1], model.config.num_experts_per_tok


def weights_by_hand(model_type: str, router: torch.nn.Module, logits: torch.Tensor, ids: list[int]) -> list[float]:
    """What the model's published formula gives these experts of one row."""
    row = [float(value) for value in logits]
    if model_type == "gpt_oss":
        powers = [math.exp(row[e]) for e in ids]
        return [power / sum(powers) for power in powers]
    if model_type in ("deepseek_v3", "glm4_moe"):
        gates = [1 / (1 + math.exp(-row[e])) for e in ids]
        scale = float(router.routed_scaling_factor)  # type: ignore[arg-type]
        total = sum(gates) + 1e-20 if router.norm_topk_prob else 1.0
        return [gate / total * scale for gate in gates]
    powers = [math.exp(value) for value in row]
    shares = [powers[e] / sum(powers) for e in ids]
    if model_type == "deepseek_v2":
        return [share * float(router.routed_scaling_factor) for share in shares]  # type: ignore[arg-type]
    if getattr(router, "norm_topk_prob", model_type == "mixtral"):
        return [share / sum(shares) for share in shares]
    return shares


@pytest.mark.parametrize(
    "model_type", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3", "deepseek_v2", "glm4_moe"]
)
@pytest.mark.parametrize("num_experts", [3, 5])
def test_substitution_weighs_what_it_keeps_by_the_models_formula(
    checkpoint: Callable[[str], Path], model_type: str, num_experts: int
) -> None:
    router, top_k = router_of(checkpoint(model_type))
    hidden = torch.randn(T, 32, generator=torch.Generator().manual_seed(2))
    budgeted = [False, True, True, True, True, True]
    seam = RouterSeam(router, E, top_k)
    with torch.inference_mode():
        logits, own_weights, own_ids = router(hidden)
        budget = ExpertBudget(experts=max(num_experts, top_k), score="probabilities", scope="request")
        selection = BudgetedSelection(budget, rows_of(budgeted, [0, 1, 1, 1, 1, 1]), ONE_RANK, None)
        seam.selection = selection
        _, weights, ids = router(hidden)
    assert selection.limits is not None
    assert torch.equal(ids[0], own_ids[0])
    assert torch.equal(weights[0], own_weights[0])
    kept = selection.limits.allowed[1].nonzero()[:, 0].tolist()
    assert top_k <= len(kept) <= max(num_experts, top_k)
    changed = 0
    for row in range(1, T):
        found = ids[row].tolist()
        assert set(found) <= set(kept)
        assert weights[row].tolist() == pytest.approx(weights_by_hand(model_type, router, logits[row], found), rel=1e-5)
        changed += sorted(found) != sorted(own_ids[row].tolist())
    assert changed


def test_experts_outside_a_rows_groups_come_last() -> None:
    affinities = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.2, 0.1, 0.3, 0.05]])
    bias = torch.tensor([0.0, -3.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0])
    in_groups = torch.tensor([[True, True, False, False, False, False, True, True]])
    allowed = torch.tensor([[False, True, True, True, False, False, False, True]])
    for outside in (-math.inf, 0.0):
        scores = (affinities + bias).masked_fill(~in_groups, outside)
        routing = Routing(scores, affinities, *scores.topk(3))
        values, ids = substitute(routing, allowed)
        # 7 and 1 are of the row's groups, 2 is the best of the others; its value is its affinity
        assert ids.tolist() == [[7, 1, 2]]
        assert values[0].tolist() == pytest.approx([0.05, -2.2, 0.7])


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("scope", [scope for scope in SCOPES if scope != "global"])
def test_rows_without_a_budget_keep_their_choice_bit_by_bit(rest: str, scope: str) -> None:
    routing = softmax_routing()
    rows = rows_of([False, True, False, True, True, False])
    selection = BudgetedSelection(ExpertBudget(experts=2, rest=rest, scope=scope), rows, FOUR_RANKS, None)
    values, ids = selection(routing)
    plain = ~rows.budgeted
    assert torch.equal(values[plain], routing.values[plain])
    assert torch.equal(ids[plain], routing.ids[plain])
    assert torch.equal(selection.truncate(ids, values)[plain], ids[plain])


def test_truncation_drops_what_is_not_kept_and_nothing_else() -> None:
    routing, rows = softmax_routing(), rows_of([True] * T)
    selection = BudgetedSelection(ExpertBudget(experts=3, rest="truncation"), rows, ONE_RANK, None)
    values, ids = selection(routing)
    assert torch.equal(values, routing.values)
    assert torch.equal(ids, routing.ids)
    assert selection.limits is not None
    cut = selection.truncate(ids, values)
    allowed = selection.limits.allowed.gather(1, ids)
    assert torch.equal(cut, torch.where(allowed, ids, E))
    assert (cut == E).any()


def test_a_router_without_top_k_is_truncated_by_its_own_weights() -> None:
    routing, rows = softmax_routing(), rows_of([True] * T)
    budget = ExpertBudget(experts=3, rest="truncation")
    steered = BudgetedSelection(budget, rows, ONE_RANK, None)
    steered(routing)
    own = BudgetedSelection(budget, rows, ONE_RANK, None)
    # Weights need not sum to one
    assert torch.equal(own.truncate(routing.ids, routing.values), steered.truncate(routing.ids, routing.values))
    assert own.limits is not None
    assert steered.limits is not None
    torch.testing.assert_close(own.limits.kept, steered.limits.kept)


def test_padding_rows_load_nothing_and_count_nowhere() -> None:
    routing = softmax_routing()
    rows = rows_of([True, True, True, False, False, False])
    padded = replace(rows, valid=torch.tensor([True, True, True, True, False, False]))
    alone = Routing(*(tensor[:4] for tensor in (routing.scores, routing.affinities, routing.values, routing.ids)))
    budget = ExpertBudget(experts=4)
    expected = limit(budget, alone, rows_of([True, True, True, False]), ONE_RANK)
    assert torch.equal(limit(budget, routing, padded, ONE_RANK).allowed[:4], expected.allowed)
