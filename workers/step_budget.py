"""A step's budget on one rank: the selections of its layers, and what they kept.

Shapes: T rows of the step, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..router.budgeted_choice import LayerRanks, Reduce
from ..router.budgeted_selection import BudgetedSelection
from ..router.compiled_choice import compiled_choice
from ..router.routing import BudgetedRows
from .plan import KeptWeight, LayerCounts, RankPlan


def budgeted_rows(plan: RankPlan, valid: torch.Tensor | None, device: torch.device) -> BudgetedRows:
    """Return which of the plan's T rows its budget acts on, in packed order; an empty plan is one padding row."""
    budgeted: list[bool] = []
    groups: list[int] = []
    reach: list[float] = []
    per_request = plan.budget is not None and plan.budget.scope == "request"
    for number, request in enumerate(plan.requests):
        num_rows = len(request.token_ids)
        first = num_rows if request.first_budgeted_row is None else request.first_budgeted_row
        budgeted += [row >= first for row in range(num_rows)]
        groups += [number if per_request else 0] * num_rows
        reach += [1.0] * first + (request.reach or [1.0] * (num_rows - first))
    if not plan.requests:
        budgeted, groups, reach = [False], [0], [1.0]
    return BudgetedRows(
        budgeted=torch.tensor(budgeted, device=device),
        valid=None if valid is None else valid.to(device),
        groups=torch.tensor(groups, device=device),
        num_groups=max(1, len(plan.requests)) if per_request else 1,
        reach=torch.tensor(reach, device=device),
        all_budgeted=all(budgeted),
    )


class StepBudget:
    """One step under a budget; empty where it cannot act: without one, or without a row that keeps to it.

    At scope global every rank takes part, since all must run the same collectives.
    """

    def __init__(
        self, plan: RankPlan, valid: torch.Tensor | None, layers: Sequence[LayerRanks], reduce: Reduce
    ) -> None:
        self._plan = plan
        self.selections: list[BudgetedSelection] = []
        acts = any(request.first_budgeted_row is not None for request in plan.requests)
        if plan.budget is None or not (acts or plan.budget.scope == "global"):
            return
        rows = budgeted_rows(plan, valid, layers[0].owner.device)
        compiled = compiled_choice(plan.budget, rows, reduce)
        self.selections = [BudgetedSelection(plan.budget, rows, layer, reduce, compiled) for layer in layers]

    def finish(self, counts: LayerCounts) -> dict[int, KeptWeight]:
        """Add what was kept to ``counts``, once all layers have run; return it by request."""
        if not self.selections:
            return {}
        limits = [selection.limits for selection in self.selections]
        assert None not in limits, "every layer has run"
        kept = torch.stack([found.kept for found in limits if found is not None]).tolist()  # [L][T]: one transfer
        return kept_weights(self._plan, kept, counts)


def kept_weights(plan: RankPlan, kept: Sequence[Sequence[float]], counts: LayerCounts) -> dict[int, KeptWeight]:
    """Add to ``counts`` what a budget ``kept`` [L][T] of the plan's rows, in packed order; return it by request."""
    weights: dict[int, KeptWeight] = {}
    start = 0
    counts.budgeted_rows[:], counts.weight_kept[:] = [0] * len(kept), [0.0] * len(kept)
    for request in plan.requests:
        stop = start + len(request.token_ids)
        first = stop if request.first_budgeted_row is None else start + request.first_budgeted_row
        if first < stop:
            totals = [sum(layer[first:stop]) for layer in kept]
            weights[request.request_id] = KeptWeight(stop - first, sum(totals) / (len(kept) * (stop - first)))
            for layer, total in enumerate(totals):
                counts.budgeted_rows[layer] += stop - first
                counts.weight_kept[layer] += total
        start = stop
    return weights
