"""`budgeted_choice.choose` as one compiled call: the same result, to the bit, for float32 routers on a CPU.

Shapes: T rows, E experts, K experts per row, G groups.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from ..kernels import expert_choice
from .budgeted_choice import LayerRanks, Limits, Reduce
from .expert_budget import ExpertBudget
from .routing import BudgetedRows, Routing


def takes(routing: Routing) -> bool:
    """Whether ``choose`` can compute this; without a compiler it can compute nothing."""
    tensors = (routing.scores, routing.affinities, routing.values)
    if routing.ids.device.type != "cpu" or any(tensor.dtype != torch.float32 for tensor in tensors):
        return False
    return expert_choice.kernel() is not None


def choose(
    budget: ExpertBudget, routing: Routing, rows: BudgetedRows, ranks: LayerRanks, reduce: Reduce | None = None
) -> tuple[Limits, torch.Tensor, torch.Tensor]:
    """Return what ``budgeted_choice.choose`` does; the routing is one that `takes` accepts."""
    library = expert_choice.kernel()
    assert library is not None, "there is no kernel without a compiler"
    num_rows, num_experts = routing.affinities.shape
    top_k = routing.ids.shape[1]
    # Held until the kernel has read them
    scores, affinities = routing.scores.contiguous(), routing.affinities.contiguous()
    own_values, own_ids = routing.values.contiguous(), routing.ids.contiguous()
    inputs = (
        _rules(budget),
        expert_choice.Rows(
            num_rows,
            rows.num_groups,
            rows.budgeted.data_ptr(),
            rows.unbudgeted.data_ptr(),
            rows.groups.data_ptr(),
            rows.reach.data_ptr(),
        ),
        expert_choice.Routing(
            num_experts,
            top_k,
            routing.in_groups,
            scores.data_ptr(),
            affinities.data_ptr(),
            own_values.data_ptr(),
            own_ids.data_ptr(),
        ),
    )
    both = None
    if budget.keeps_some and budget.scope == "global":
        assert reduce is not None, "scope global sums over ranks"
        both = torch.empty(2, rows.num_groups, num_experts)
        library.expert_worth(*inputs, both.data_ptr())
        reduce(both)
    allowed, kept = torch.empty(num_rows, num_experts, dtype=torch.bool), torch.empty(num_rows)
    values, ids = own_values, own_ids
    if budget.rest == "substitution":
        values, ids = torch.empty(num_rows, top_k), torch.empty(num_rows, top_k, dtype=torch.int64)
    library.choose_experts(
        *inputs,
        expert_choice.Ranks(ranks.num_ranks, ranks.home, ranks.owner.data_ptr()),
        None if both is None else both.data_ptr(),
        allowed.data_ptr(),
        kept.data_ptr(),
        values.data_ptr(),
        ids.data_ptr(),
    )
    return Limits(allowed, kept), values, ids


@lru_cache(maxsize=64)
def _rules(budget: ExpertBudget) -> ctypes.Structure:
    if not budget.keeps_some:
        kept = "all"
    elif budget.coverage is not None:
        kept = "covering"
    else:
        kept = "most_important_of_owners" if budget.scope == "owner" else "most_important"
    return expert_choice.Budget(
        score=expert_choice.SCORES.index(budget.score),
        list=expert_choice.LISTS.index(kept),
        coverage=budget.coverage or 0.0,
        substitutes=budget.rest == "substitution",
        limits_ranks=budget.limits_ranks,
        min_rank_share=budget.min_rank_share,
        experts=budget.experts or 0,
        max_ranks=_EVERY_RANK if budget.max_ranks_per_row is None else budget.max_ranks_per_row,
    )


_EVERY_RANK = 2**62
