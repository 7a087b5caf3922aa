"""The budget of experts that an engine's verifications keep to."""

from __future__ import annotations

from ...router.expert_budget import ExpertBudget
from ...workers.model_info import ModelInfo
from ..config import EngineConfig


def make_budget(config: EngineConfig, model: ModelInfo) -> ExpertBudget | None:
    """Return what ``config`` asks for; None if that is nothing, or can change nothing.

    Raises ``ValueError`` naming ``expert_budget`` if ``model`` cannot keep to it.
    """
    budget = config.budget
    if budget is None:
        return None
    budget.check(model.num_experts, model.num_experts_per_tok, steerable=model.steerable)
    return None if budget.is_void(model.num_experts, config.expert_parallel_size) else budget
