"""A layer's selection under a budget, in the router's place.

Shapes: T rows, E experts, K experts per row.
"""

from __future__ import annotations

import torch

from . import budgeted_choice, compiled_choice
from .budgeted_choice import LayerRanks, Limits, Reduce
from .expert_budget import ExpertBudget
from .routing import BudgetedRows, Routing


class BudgetedSelection:
    """The router's selection of one layer under a budget; keeps what it allowed for whoever computes the experts."""

    def __init__(self, budget: ExpertBudget, rows: BudgetedRows, ranks: LayerRanks, reduce: Reduce | None) -> None:
        self._budget, self._rows, self._ranks, self._reduce = budget, rows, ranks, reduce
        self.limits: Limits | None = None

    def __call__(self, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the choice within the budget: one compiled call where that can take the routing."""
        choose = compiled_choice.choose if compiled_choice.takes(routing) else budgeted_choice.choose
        self.limits, values, ids = choose(self._budget, routing, self._rows, self._ranks, self._reduce)
        return values, ids

    def truncate(self, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return ``expert_ids`` [T, K] with the sentinel E in place of those not allowed; as they are if none can be.

        A router that nothing selected for, as it has no top-k, is limited here by its own ids and ``weights`` [T, K].
        """
        num_experts = len(self._ranks.owner)
        if self._budget.allows_top_k and self.limits is not None:
            return expert_ids
        if self.limits is None:
            affinities = torch.zeros(len(expert_ids), num_experts, device=expert_ids.device)
            affinities.scatter_(1, expert_ids, weights.float())
            self(Routing(affinities, affinities, weights, expert_ids))
            assert self.limits is not None
        return expert_ids.masked_fill(~self.limits.allowed.gather(1, expert_ids), num_experts)
