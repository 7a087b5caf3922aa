"""The budgets of experts that an engine's verifications may keep to."""

from __future__ import annotations

from collections.abc import Sequence

from ...workers.model_info import ModelInfo
from ..config import EngineConfig
from ..speculation.budget_level import BudgetLevel


def make_levels(config: EngineConfig, model: ModelInfo, known: Sequence[BudgetLevel] = ()) -> list[BudgetLevel]:
    """Return the levels that ``config`` asks for, less those that can change nothing.

    ``known``: what a profile says of some of them. Raises ``ValueError`` naming ``expert_budget`` if ``model`` cannot
    keep to one.
    """
    found = {level.budget: level for level in known}
    for budget in config.budgets:
        budget.check(model.num_experts, model.num_experts_per_tok, steerable=model.steerable)
    return [
        found.get(budget, BudgetLevel(budget))
        for budget in config.budgets
        if not budget.is_void(model.num_experts, config.expert_parallel_size)
    ]
