"""The budgets of experts that an engine's verifications may keep to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...router.expert_budget import ExpertBudget
from ...workers.model_info import ModelInfo
from ..config import EngineConfig
from ..speculation.budget_level import BudgetLevel

_EXPERTS_SAVED = 1 / 3
"""What a limit on experts is taken to save where no profile says: what the demo model's served budget does."""
_RANKS_KEPT = 2 / 3
"""Rows sent that a limit on ranks is taken to leave: what two other ranks of eight left (benchmarks/budget_traffic)."""


@dataclass(frozen=True, slots=True)
class EngineBudget:
    """A budget that may be kept to, and what is known of it."""

    budget: ExpertBudget
    experts_saved: float | None = None
    """Share of distinct experts that it saved when it was calibrated; None where that is not known."""
    num_rows: int = 8
    """Rows of the verifications that ``experts_saved`` is a mean over."""

    @property
    def level(self) -> BudgetLevel:
        """What a controller is told of it."""
        assumed = _EXPERTS_SAVED if self.budget.limits_experts else 0.0
        return BudgetLevel(
            assumed if self.experts_saved is None else self.experts_saved,
            self.num_rows,
            _RANKS_KEPT if self.budget.limits_ranks else 1.0,
        )


def make_budgets(config: EngineConfig, model: ModelInfo, known: Sequence[EngineBudget] = ()) -> list[EngineBudget]:
    """Return the budgets that ``config`` asks for, less those that can change nothing.

    ``known``: what a profile says of some of them. Raises ``ValueError`` naming ``expert_budget`` if ``model`` cannot
    keep to one.
    """
    found = {entry.budget: entry for entry in known}
    for budget in config.budgets:
        budget.check(model.num_experts, model.num_experts_per_tok, steerable=model.steerable)
    return [
        found.get(budget, EngineBudget(budget))
        for budget in config.budgets
        if not budget.is_void(model.num_experts, config.expert_parallel_size)
    ]
