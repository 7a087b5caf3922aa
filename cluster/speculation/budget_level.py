"""One budget of experts among those that a server may keep its verifications to, as a controller sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...router.expert_budget import ExpertBudget

_EXPERTS_SAVED = 1 / 3
"""What a limit on experts is taken to save where no profile says: what the demo model's served budget does."""
_RANKS_KEPT = 2 / 3
"""Rows sent that a limit on ranks is taken to leave: what two other ranks of eight left (benchmarks/budget_traffic)."""


@dataclass(frozen=True, slots=True)
class BudgetLevel:
    """A budget, and what it is expected to save before it has been tried."""

    budget: ExpertBudget
    experts_saved: float | None = None
    """Share of distinct experts that it saved when it was calibrated; None where that is not known."""
    num_rows: int = 8
    """Rows of the verifications that ``experts_saved`` is a mean over."""

    def experts_kept(self, num_rows: int) -> float:
        """Return the share of distinct experts that a step of ``num_rows`` rows is expected to read under it.

        All of them with one row, which a budget leaves alone; as calibrated with so many rows as then, or more.
        """
        saved = self.experts_saved
        if saved is None:
            saved = _EXPERTS_SAVED if self.budget.limits_experts else 0.0
        return 1 - saved * min(1.0, math.log(num_rows) / math.log(max(2, self.num_rows)))

    @property
    def ranks_kept(self) -> float:
        """Share of rows sent between ranks that it is expected to leave."""
        return _RANKS_KEPT if self.budget.limits_ranks else 1.0
