"""The speculation policies by name."""

from __future__ import annotations

from collections.abc import Sequence

from .budget_level import BudgetLevel
from .cascade import CascadeController
from .controller import Controller
from .fixed import FixedController
from .shadow import ShadowController

POLICIES = ("off", "fixed", "cascade", "shadow")


def make_controller(
    policy: str,
    *,
    draft_len: int,
    max_draft_len: int,
    num_experts: int,
    num_experts_per_tok: int,
    num_ranks: int,
    levels: Sequence[BudgetLevel] = (),
) -> Controller:
    """Return a new controller; raise ``ValueError`` listing the valid names for an unknown one.

    ``draft_len``: what `fixed` always drafts; ``max_draft_len``: the most that `cascade` and `shadow` may choose; the
    rest describes the model, its ranks and the ``levels`` of budget to choose from, by which `shadow` knows what it
    cannot have measured yet.
    """
    if policy == "off":
        return FixedController(0)
    if policy == "fixed":
        return FixedController(draft_len)
    if policy == "cascade":
        return CascadeController(max_draft_len)
    if policy == "shadow":
        return ShadowController(max_draft_len, num_experts, num_experts_per_tok, num_ranks, levels)
    raise ValueError(f"speculation: {policy!r} is not one of {', '.join(POLICIES)}")
