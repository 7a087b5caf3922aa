"""A layer's selection under a budget, in the router's place.

Shapes: T rows, E experts, K experts per row.
"""

from __future__ import annotations

import torch

from .budgeted_choice import LayerRanks, Limits, Reduce, choose
from .compiled_choice import CompiledChoice, compiled_choice
from .expert_budget import ExpertBudget
from .routing import BudgetedRows, Routing


class BudgetedSelection:
    """The router's selection of one layer under a budget; keeps what it allowed for whoever computes the experts.

    ``compiled`` is of this step: layers share it.
    """

    def __init__(
        self,
        budget: ExpertBudget,
        rows: BudgetedRows,
        ranks: LayerRanks,
        reduce: Reduce | None,
        compiled: CompiledChoice | None = None,
    ) -> None:
        self._budget, self._rows, self._ranks, self._reduce = budget, rows, ranks, reduce
        self._compiled = compiled or compiled_choice(budget, rows, reduce)
        self._may_drop = not budget.allows_top_k
        self.limits: Limits | None = None

    def __call__(self, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the choice within the budget: one compiled call where there is one for this router."""
        if self._compiled is not None and self._compiled.takes(routing):
            self.limits, values, ids = self._compiled(routing, self._ranks)
        else:
            self.limits, values, ids = choose(self._budget, routing, self._rows, self._ranks, self._reduce)
        return values, ids

    def truncate(self, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return ``expert_ids`` [T, K] with the sentinel E in place of those not allowed; as they are if none can be.

        A router that nothing selected for, as it has no top-k, is limited here by its own ids and ``weights`` [T, K].
        """
        if self.limits is not None and not self._may_drop:
            return expert_ids
        num_experts = len(self._ranks.owner)
        if self.limits is None:
            affinities = torch.zeros(len(expert_ids), num_experts, device=expert_ids.device)
            affinities.scatter_(1, expert_ids, weights.float())
            self(Routing(affinities, affinities, weights, expert_ids))
            assert self.limits is not None
        return expert_ids.masked_fill(~self.limits.allowed.gather(1, expert_ids), num_experts)
