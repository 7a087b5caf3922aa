"""What each expert is worth to the budgeted rows of a group.

Shapes: T rows, E experts, K experts per row, G groups.
"""

from __future__ import annotations

import torch

from .routing import BudgetedRows, Routing, row_shares


def selected(shares: torch.Tensor, rows: BudgetedRows) -> torch.Tensor:
    """Return [T, K]: the share of its weight that a row gives each expert that it selects."""
    return shares


def squared(shares: torch.Tensor, rows: BudgetedRows) -> torch.Tensor:
    """Return [T, K]: the square of `selected`.

    A row that loses an expert is wrong by that share of its output, and squares are what errors cost: one expert that a
    row leans on is worth more than several that some rows touch.
    """
    return shares.square()


def survival(shares: torch.Tensor, rows: BudgetedRows) -> torch.Tensor:
    """Return [T, K]: `squared`, times the probability that the row is reached (as AcceptMoE, arXiv 2608.02989)."""
    return shares.square() * rows.reach[:, None]


OF_SELECTED = {"selected": selected, "squared": squared, "survival": survival}
"""Scores that see what rows selected, by name; nothing else is worth anything to them."""


def group_importance(score: str, routing: Routing, shares: torch.Tensor, rows: BudgetedRows) -> torch.Tensor:
    """Return [G, E] f32: the sum of ``score`` over the budgeted rows of each group.

    ``probabilities`` is the router's probability of every expert, selected or not (MoE-Spec's, arXiv 2602.16052); of a
    sigmoid router the affinities as shares of their row's sum, so that rows count alike. ``shares`` [T, K]: the
    routing's own.
    """
    if score == "probabilities":
        per_row = row_shares(routing.affinities)
    else:
        worth = OF_SELECTED[score](shares, rows)
        per_row = worth.new_zeros(routing.affinities.shape).scatter_(1, routing.ids, worth)
    # Rows that do not count add to a group behind the last
    sums = per_row.new_zeros(rows.num_groups + 1, per_row.shape[1])
    return sums.index_add_(0, rows.counted_groups, per_row)[: rows.num_groups]


def loaded_anyway(routing: Routing, rows: BudgetedRows) -> torch.Tensor:
    """Return [G, E] bool: experts that unbudgeted rows of the group have selected."""
    num_experts = routing.affinities.shape[1]
    loaded = torch.zeros((rows.num_groups + 1) * num_experts, dtype=torch.bool, device=routing.ids.device)
    if not rows.all_budgeted:
        places = rows.loading_groups[:, None] * num_experts + routing.ids
        loaded.scatter_(0, places.flatten(), value=True)
    return loaded.view(-1, num_experts)[: rows.num_groups]
