"""What each expert is worth to the budgeted rows of a group.

Shapes: T rows, E experts, G groups.
"""

from __future__ import annotations

import torch

from .routing import BudgetedRows, Routing, row_shares


def probabilities(routing: Routing, rows: BudgetedRows) -> torch.Tensor:
    """Return [T, E]: the router's probability of every expert, selected or not (MoE-Spec's, arXiv 2602.16052).

    Of a sigmoid router the affinities as shares of their row's sum: rows count alike.
    """
    return row_shares(routing.affinities)


def selected(routing: Routing, rows: BudgetedRows) -> torch.Tensor:
    """Return [T, E]: the share of its weight that a row gives each expert, 0 for those it does not select."""
    return torch.zeros_like(routing.affinities, dtype=torch.float32).scatter_(1, routing.ids, routing.shares)


def squared(routing: Routing, rows: BudgetedRows) -> torch.Tensor:
    """Return [T, E]: the square of `selected`.

    A row that loses an expert is wrong by that share of its output, and squares are what errors cost: one expert that a
    row leans on is worth more than several that some rows touch.
    """
    return selected(routing, rows) ** 2


def survival(routing: Routing, rows: BudgetedRows) -> torch.Tensor:
    """Return [T, E]: `squared`, times the probability that the row is reached (as AcceptMoE, arXiv 2608.02989)."""
    return squared(routing, rows) * rows.reach[:, None]


IMPORTANCE = {"probabilities": probabilities, "selected": selected, "squared": squared, "survival": survival}


def group_importance(score: str, routing: Routing, rows: BudgetedRows) -> torch.Tensor:
    """Return [G, E] f32: the sum of ``score`` over the budgeted rows of each group."""
    per_row = IMPORTANCE[score](routing, rows).masked_fill(~rows.budgeted[:, None], 0.0)
    return per_row.new_zeros(rows.num_groups, per_row.shape[1]).index_add_(0, rows.groups, per_row)


def loaded_anyway(routing: Routing, rows: BudgetedRows) -> torch.Tensor:
    """Return [G, E] bool: experts that unbudgeted rows of the group have selected."""
    num_experts = routing.affinities.shape[1]
    # Rows that do not count point behind the last expert
    ids = routing.ids.masked_fill(~rows.unbudgeted[:, None], num_experts)
    places = (rows.groups[:, None] * (num_experts + 1) + ids).flatten()
    loaded = torch.zeros(rows.num_groups * (num_experts + 1), dtype=torch.bool, device=ids.device)
    loaded.scatter_(0, places, value=True)
    return loaded.view(rows.num_groups, num_experts + 1)[:, :num_experts]
