"""A budget at work in one layer, in torch's operations: the router's own choice in, the choice within it out.

Nothing here depends on a number on the host, so a GPU can capture it in a graph. `compiled_choice` repeats it on a CPU.

Shapes: T rows, E experts, K experts per row, G groups, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from ..kernels.expert_choice import Ranks
from .expert_budget import ExpertBudget
from .importance import group_importance, loaded_anyway
from .order import best_first, row_sums
from .routing import BudgetedRows, Routing, row_shares
from .shortlist import covering, discounted, most_important, most_important_of_owners
from .traffic import visited_ranks

Reduce = Callable[[torch.Tensor], None]
"""Sums a tensor over all ranks, in place."""


@dataclass(frozen=True)
class LayerRanks:
    """Where a layer's experts are, as one rank sees it."""

    owner: torch.Tensor
    """[E] rank that computes each expert for this rank's rows; changed in place where experts move."""
    num_ranks: int
    home: int
    """This rank."""

    @cached_property
    def described(self) -> Ranks:
        """What a kernel reads of them on a CPU; holds no reference to ``owner``."""
        return Ranks(self.num_ranks, self.home, self.owner.data_ptr())


@dataclass(frozen=True, slots=True)
class Limits:
    """What one layer's budget allows."""

    allowed: torch.Tensor
    """[T, E] bool: experts that a row may use; all of them for rows without a budget."""
    kept: torch.Tensor
    """[T] f32: share of the weight that the row's own choice has on allowed experts."""


def limit(
    budget: ExpertBudget, routing: Routing, rows: BudgetedRows, ranks: LayerRanks, reduce: Reduce | None = None
) -> Limits:
    """Return what ``budget`` allows each row; ``reduce`` is needed at scope global, and called once."""
    shares = routing.shares
    if budget.keeps_some:
        importance, loaded = group_importance(budget.score, routing, shares, rows), loaded_anyway(routing, rows)
        if budget.scope == "global":
            assert reduce is not None, "scope global sums over ranks"
            both = torch.stack([importance, loaded.float()])
            reduce(both)
            importance, loaded = both[0], both[1] > 0
        allowed = _shortlist(budget, importance, loaded, routing.ids.shape[1], ranks, rows.num_experts)[rows.groups]
    else:
        allowed = torch.ones_like(routing.affinities, dtype=torch.bool)
    if budget.limits_ranks and ranks.num_ranks > 1:
        allowed = allowed & _on_visited_ranks(budget, routing, allowed, ranks)
    if not rows.all_budgeted:
        allowed = allowed | rows.free[:, None]
    return Limits(allowed, row_sums(shares * allowed.gather(1, routing.ids))[:, 0])


def substitute(routing: Routing, allowed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values [T, K], ids [T, K]) of the best ``allowed`` [T, E] experts of each row.

    A row whose own choice is allowed keeps it, bit by bit. Of experts with the same score the one with the lowest id
    comes first. A row with less than K of them gets others too, behind those; whoever computes experts leaves them out.
    Where the router is limited to groups of experts the allowed ones of the row's groups come first, then those of
    other groups.
    """
    scores = order = routing.scores
    if routing.in_groups:
        affinities = routing.affinities
        outside = scores.isneginf() | ((scores == 0) & (affinities > 0))
        lowest = scores.masked_fill(outside, torch.inf).amin(dim=1, keepdim=True)
        order = torch.where(outside, lowest - 2 + affinities, scores)
        scores = torch.where(outside, affinities.to(scores.dtype), scores)
    ids = best_first(order.masked_fill(~allowed, -torch.inf))[:, : routing.ids.shape[1]]
    keeps = allowed.gather(1, routing.ids).all(dim=1, keepdim=True)
    return torch.where(keeps, routing.values, scores.gather(1, ids)), torch.where(keeps, routing.ids, ids)


def choose(
    budget: ExpertBudget, routing: Routing, rows: BudgetedRows, ranks: LayerRanks, reduce: Reduce | None = None
) -> tuple[Limits, torch.Tensor, torch.Tensor]:
    """Return what ``budget`` allows, and (values [T, K], ids [T, K]) of the choice within it.

    Rows without a budget keep their router's own, bit by bit; so do all under truncation, whose experts are left out
    later. ``reduce`` is needed at scope global, and called once.
    """
    limits = limit(budget, routing, rows, ranks, reduce)
    if budget.rest == "truncation":
        return limits, routing.values, routing.ids
    return limits, *substitute(routing, limits.allowed)


def _shortlist(
    budget: ExpertBudget,
    importance: torch.Tensor,
    loaded: torch.Tensor,
    top_k: int,
    ranks: LayerRanks,
    num_experts: torch.Tensor | None,
) -> torch.Tensor:
    if budget.coverage is not None:
        return covering(importance, loaded, budget.coverage, top_k)
    assert budget.experts is not None, "a budget without a number covers a share"
    number = budget.experts if num_experts is None else num_experts
    if budget.scope == "owner":
        return most_important_of_owners(importance, loaded, number, ranks.owner, ranks.num_ranks)
    if budget.rank_balance:
        importance = discounted(importance, number, ranks.owner, ranks.num_ranks, budget.rank_balance)
    return most_important(importance, loaded, number)


def _on_visited_ranks(budget: ExpertBudget, routing: Routing, allowed: torch.Tensor, ranks: LayerRanks) -> torch.Tensor:
    """Return [T, E] bool: experts on the ranks that each row may visit, by what it would choose among ``allowed``."""
    ids = substitute(routing, allowed)[1] if budget.rest == "substitution" else routing.ids
    shares = row_shares(routing.affinities.gather(1, ids) * allowed.gather(1, ids))
    visited = visited_ranks(
        ids, shares, ranks.owner, ranks.num_ranks, ranks.home, budget.max_ranks_per_row, budget.min_rank_share
    )
    return visited[:, ranks.owner]
