"""A layer's choice of experts in one launch behind its router's logits, in a step of fixed shape.

Where a budget is none that the kernel knows, the router's own code chooses, at its seam.

Shapes: T rows, E experts, K experts per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..kernels.routing_rules import KeptExperts, affinities_and_scores
from ..router.budgeted_choice import LayerRanks, Reduce
from ..router.expert_budget import ExpertBudget
from ..router.routing import BudgetedRows
from .known_routers import KnownRouter


class LaunchedRouting:
    """One layer's choice in one launch, within a budget if there is one; padding rows get no expert.

    ``kept`` [T] f32, after the layer has run: the share of its weight that the budget left each row.
    """

    def __init__(
        self, known: KnownRouter, valid: torch.Tensor, kept: KeptExperts | None, reduce: Reduce | None
    ) -> None:
        self._known, self._valid, self._kept, self._reduce = known, valid, kept, reduce
        self.kept: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor, args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what the router returns for ``logits`` [T, E], of which it makes weights and ids [T, K]."""
        from ..kernels.expert_routing import route

        known = self._known
        bias, scales = (None if find is None else find(args) for find in (known.find_bias, known.find_scales))
        routed = route(logits, known.router, bias, self._kept, self._valid, self._reduce, scales)
        self.kept = routed.kept
        first = affinities_and_scores(logits, known.router, None)[0] if known.returns_affinities else logits
        return first, routed.weights, routed.ids


def launched_routings(
    known: Sequence[KnownRouter],
    budget: ExpertBudget | None,
    rows: BudgetedRows | None,
    valid: torch.Tensor,
    layers: Sequence[LayerRanks],
    reduce: Reduce,
) -> list[LaunchedRouting]:
    """Return each layer's choice in a step; empty where the routers' own code chooses. ``rows``: under a budget."""
    if not known or (budget is not None and not knows(budget)):
        return []
    reduces = reduce if budget is not None and budget.scope == "global" else None
    return [
        LaunchedRouting(router, valid, None if budget is None else _kept(budget, rows, layer), reduces)
        for router, layer in zip(known, layers, strict=True)
    ]


def knows(budget: ExpertBudget) -> bool:
    """Whether the kernel keeps to ``budget``: to a list of experts, but to no limits on the ranks of a row."""
    return budget.keeps_some and not budget.limits_ranks


def _kept(budget: ExpertBudget, rows: BudgetedRows | None, layer: LayerRanks) -> KeptExperts:
    assert rows is not None, "a budget acts on rows"
    assert budget.coverage is not None or rows.num_experts is not None, "a step of fixed shape reads its number"
    return KeptExperts(
        score=budget.score,
        num_groups=rows.num_groups,
        budgeted=rows.budgeted,
        reach=rows.reach,
        num_experts=rows.num_experts if budget.coverage is None else None,
        coverage=1.0 if budget.coverage is None else budget.coverage,
        owner=layer.owner if budget.is_per_owner else None,
        balance=budget.rank_balance,
        truncates=budget.rest == "truncation",
    )
