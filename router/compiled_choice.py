"""`budgeted_choice.choose` as one compiled call: the same result, to the bit, for float32 routers on a CPU.

A step of few rows finds the caches full of weights, so what choosing costs is the code it runs through: little is left
to do in a layer, and the step is described to the kernel once.

Shapes: T rows, E experts, K experts per row, G groups.
"""

from __future__ import annotations

import ctypes

import torch

from ..kernels.expert_choice import LISTS, SCORES, Budget, Rows, kernel
from .budgeted_choice import LayerRanks, Limits, Reduce
from .expert_budget import ExpertBudget
from .routing import BudgetedRows, Routing

_EVERY_RANK = 2**62


class CompiledChoice:
    """`budgeted_choice.choose` for the layers of one step."""

    def __init__(
        self, library: ctypes.CDLL, budget: ExpertBudget, rows: BudgetedRows, reduce: Reduce | None = None
    ) -> None:
        self._library, self._reduce = library, reduce
        self._rules, self._rows = _rules(budget), _rows(rows)
        self._read = rows  # held as long as the kernel reads it
        self._sums_over_ranks = budget.keeps_some and budget.scope == "global"
        self._substitutes = budget.rest == "substitution"

    @staticmethod
    def takes(routing: Routing) -> bool:
        """Whether it can choose for this router."""
        return routing.scores.dtype == routing.affinities.dtype == torch.float32 and routing.ids.is_cpu

    def __call__(self, routing: Routing, ranks: LayerRanks) -> tuple[Limits, torch.Tensor, torch.Tensor]:
        """Return what ``budgeted_choice.choose`` does."""
        num_rows, num_experts = routing.affinities.shape
        top_k = routing.ids.shape[1]
        assert num_rows == self._rows.num_rows, "a layer routes the step's rows"
        # Held until the kernel has read them
        scores, affinities = routing.scores.contiguous(), routing.affinities.contiguous()
        own_values, own_ids = routing.values.contiguous(), routing.ids.contiguous()
        rules, rows = ctypes.addressof(self._rules), ctypes.addressof(self._rows)
        both = None
        if self._sums_over_ranks:
            assert self._reduce is not None, "scope global sums over ranks"
            both = torch.empty(2, self._rows.num_groups, num_experts)
            self._library.expert_worth(
                rules, rows, num_experts, top_k, affinities.data_ptr(), own_ids.data_ptr(), both.data_ptr()
            )
            self._reduce(both)
        allowed, kept = torch.empty(num_rows, num_experts, dtype=torch.bool), torch.empty(num_rows)
        values, ids = own_values, own_ids
        if self._substitutes:
            values, ids = torch.empty(num_rows, top_k), torch.empty(num_rows, top_k, dtype=torch.int64)
        self._library.choose_experts(
            rules,
            rows,
            ctypes.addressof(ranks.described),
            None if both is None else both.data_ptr(),
            num_experts,
            top_k,
            routing.in_groups,
            scores.data_ptr(),
            affinities.data_ptr(),
            own_values.data_ptr(),
            own_ids.data_ptr(),
            allowed.data_ptr(),
            kept.data_ptr(),
            values.data_ptr(),
            ids.data_ptr(),
        )
        return Limits(allowed, kept), values, ids


def compiled_choice(budget: ExpertBudget, rows: BudgetedRows, reduce: Reduce | None = None) -> CompiledChoice | None:
    """Return it for rows on a CPU whose budget the host knows; None for others, and without a compiler."""
    library = kernel() if rows.groups.is_cpu and rows.num_experts is None else None
    return None if library is None else CompiledChoice(library, budget, rows, reduce)


def _rules(budget: ExpertBudget) -> Budget:
    if not budget.keeps_some:
        kept = "all"
    elif budget.coverage is not None:
        kept = "covering"
    else:
        kept = "most_important_of_owners" if budget.scope == "owner" else "most_important"
    return Budget(
        score=SCORES.index(budget.score),
        list=LISTS.index(kept),
        coverage=budget.coverage or 0.0,
        substitutes=budget.rest == "substitution",
        limits_ranks=budget.limits_ranks,
        min_rank_share=budget.min_rank_share,
        beyond_part=1 - budget.rank_balance,
        experts=budget.experts or 0,
        max_ranks=_EVERY_RANK if budget.max_ranks_per_row is None else budget.max_ranks_per_row,
    )


def _rows(rows: BudgetedRows) -> Rows:
    return Rows(
        num_rows=len(rows.groups),
        num_groups=rows.num_groups,
        budgeted=rows.budgeted.data_ptr(),
        valid=None if rows.valid is None else rows.valid.data_ptr(),
        groups=rows.groups.data_ptr(),
        reach=rows.reach.data_ptr(),
    )
