"""What routers choose, and budgets leave them: the terms of `expert_routing`, and its reference in torch's operations.

Shapes: T rows, E experts, K experts per row, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

SCORES = ("probabilities", "selected", "squared", "survival")
NUMBER, SHARE, PARTS, BALANCED = range(4)
"""How a list is cut: see `KeptExperts`."""


@dataclass(frozen=True, slots=True)
class GroupLimit:
    """Rows choose within their best groups of experts, which are runs of E / ``num_groups``."""

    num_groups: int
    num_kept: int
    """Groups that stay for a row; of groups that are worth the same those with the lowest ids."""
    num_best: int
    """A group is worth the sum of its so many best scores, 1 or 2."""
    outside: float = -torch.inf
    """What a router sets the scores of a row's other experts to, 0 or -inf; none that stay have less."""


@dataclass(frozen=True, slots=True)
class Router:
    """What a model's router makes of its logits."""

    top_k: int
    sigmoid: bool = False
    """Affinities are sigmoids of the logits, else their softmax."""
    normalise: bool = True
    """The weights of a row's experts are shares of their sum."""
    scale: float = 1.0
    """What weights are multiplied by."""
    by_logits: bool = False
    """It selects by its logits, else by affinities."""
    limit: GroupLimit | None = None
    dtype: torch.dtype = torch.float32
    """Of the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptExperts:
    """A budget: which experts the rows of a group may use; experts that other rows of it chose may be used besides.

    Without ``owner``: the ``num_experts`` that are worth most, or the fewest that hold ``coverage``. With it: of every
    rank its part of ``num_experts``, or where ``balance`` is not 0, the ``num_experts`` that are worth most once those
    beyond their rank's part have lost that share of their worth.
    """

    score: str
    """One of `SCORES`."""
    num_groups: int
    """Groups are runs of T / G rows."""
    budgeted: torch.Tensor
    """[T] bool: rows that choose again."""
    reach: torch.Tensor
    """[T] f32: the probability that a row's token is used."""
    num_experts: torch.Tensor | None = None
    """[1] int64 on the device; None with ``coverage``."""
    coverage: float = 1.0
    owner: torch.Tensor | None = None
    """[E] int64: the rank that holds each expert."""
    balance: float = 0.0
    truncates: bool = False
    """Experts that a row may not use become "none", id E, and it chooses no others."""

    @property
    def rule(self) -> int:
        """How the list is cut."""
        if self.num_experts is None:
            return SHARE
        if self.owner is None:
            return NUMBER
        return BALANCED if self.balance else PARTS


@dataclass(frozen=True, slots=True)
class Routed:
    """The choice; of experts with equal scores the one with the lowest id comes first."""

    ids: torch.Tensor
    """[T, K] int64; E for "none"."""
    weights: torch.Tensor
    """[T, K]"""
    kept: torch.Tensor
    """[T] f32: the share of its own choice's weight that a row's budget left it."""


Reduce = Callable[[torch.Tensor], None]
"""Sums a tensor over all ranks, in place."""


def route_reference(
    logits: torch.Tensor,
    router: Router,
    bias: torch.Tensor | None = None,
    budget: KeptExperts | None = None,
    valid: torch.Tensor | None = None,
    reduce: Reduce | None = None,
    scales: torch.Tensor | None = None,
) -> Routed:
    """Do what `expert_routing.route` does in torch's operations, on the host."""
    routed = room_for(logits, router)
    num_rows, num_experts = logits.shape
    affinities, scores = affinities_and_scores(logits, router, bias)
    is_valid = torch.ones(num_rows, dtype=torch.bool, device=logits.device) if valid is None else valid
    own_scores = scores if router.limit is None else scores.masked_fill(~inside(scores, router.limit), -torch.inf)
    ids = _best(own_scores)[:, : router.top_k]
    is_none = ~is_valid[:, None].expand_as(ids)
    routed.kept.fill_(1.0)
    if budget is not None:
        own = affinities.gather(1, ids)
        shares = own / _at_least_tiny(own.sum(dim=1, keepdim=True))
        counted, others = budget.budgeted, ~budget.budgeted & is_valid
        per_row = affinities.new_zeros(affinities.shape)
        if budget.score == "probabilities":
            per_row = affinities / _at_least_tiny(affinities.sum(dim=1, keepdim=True))
        else:
            found = {"selected": shares, "squared": shares**2, "survival": shares**2 * budget.reach[:, None]}
            per_row = per_row.scatter(1, ids, found[budget.score])
        chosen = affinities.new_zeros(affinities.shape).scatter(1, ids, 1.0)
        parts = torch.stack([per_row * counted[:, None], chosen * others[:, None]])
        worth = parts.view(2, budget.num_groups, -1, num_experts).sum(dim=2)
        if reduce is not None:
            reduce(worth)
        lists = torch.stack(
            [_listed(worth[0, group], worth[1, group], budget, router.top_k) for group in range(budget.num_groups)]
        )
        allowed = lists.repeat_interleave(num_rows // budget.num_groups, dim=0)
        is_allowed = allowed.gather(1, ids) | ~counted[:, None]
        routed.kept.copy_((shares * is_allowed).sum(dim=1).where(counted, 1.0))
        if budget.truncates:
            is_none = is_none | ~is_allowed
        else:
            order = scores if router.limit is None else _limited_order(scores, affinities, router.limit)
            again = _best(order.masked_fill(~allowed, -torch.inf))[:, : router.top_k]
            ids = torch.where(is_allowed.all(dim=1, keepdim=True), ids, again)
    weights = affinities.gather(1, ids)
    if router.normalise:
        weights = weights / _at_least_tiny(weights.sum(dim=1, keepdim=True))
    if scales is not None:
        weights = weights * scales.float()[ids]
    routed.ids.copy_(ids.masked_fill(is_none, num_experts))
    routed.weights.copy_(weights * router.scale)
    return routed


def affinities_and_scores(
    logits: torch.Tensor, router: Router, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the router weighs experts by, and what it selects them by: [T, E] f32 each."""
    numbers = logits.float()
    affinities = numbers.sigmoid() if router.sigmoid else numbers.softmax(dim=-1)
    scores = numbers if router.by_logits else affinities
    return affinities, scores if bias is None else scores + bias.float()


def inside(scores: torch.Tensor, limit: GroupLimit) -> torch.Tensor:
    """Return [T, E] bool: which experts are of their row's groups."""
    worth = group_worth(scores, limit)
    stays = torch.zeros_like(worth, dtype=torch.bool).scatter(1, _best(worth)[:, : limit.num_kept], value=True)
    return stays.repeat_interleave(scores.shape[1] // limit.num_groups, dim=1)


def group_worth(scores: torch.Tensor, limit: GroupLimit) -> torch.Tensor:
    """Return what the groups of experts are worth to each row, [T, number of groups]."""
    return scores.view(len(scores), limit.num_groups, -1).topk(limit.num_best, dim=2).values.sum(dim=2)


def outside(scores: torch.Tensor, affinities: torch.Tensor) -> torch.Tensor:
    """Return [T, E] bool: which experts a router that limits rows to groups has set aside, as a budget tells."""
    return scores.isneginf() | ((scores == 0) & (affinities > 0))


def _limited_order(scores: torch.Tensor, affinities: torch.Tensor, limit: GroupLimit) -> torch.Tensor:
    """Return what rows choose by within a budget, which outranks groups: their own groups' experts, then the others."""
    scores = scores.masked_fill(~inside(scores, limit), limit.outside)
    is_outside = outside(scores, affinities)
    lowest = scores.masked_fill(is_outside, torch.inf).amin(dim=1, keepdim=True)
    return torch.where(is_outside, lowest - 2 + affinities, scores)


def _best(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.argsort(dim=-1, descending=True, stable=True)


def _at_least_tiny(sums: torch.Tensor) -> torch.Tensor:
    return sums.clamp_min(torch.finfo(torch.float32).tiny)


def _listed(worth: torch.Tensor, loaded: torch.Tensor, budget: KeptExperts, top_k: int) -> torch.Tensor:
    """Return [E] bool: which experts a group's list has, by their ``worth`` [E] and how often they are ``loaded``."""
    is_loaded = loaded > 0
    order = _best(worth.masked_fill(is_loaded, torch.inf) if budget.num_experts is None else worth)
    if budget.num_experts is None:
        ranked = worth[order]
        wanted = ranked.cumsum(0) - ranked < budget.coverage * ranked.sum()
        wanted[:top_k] = True
        return is_loaded.scatter(0, order[wanted], value=True)
    number = int(budget.num_experts)
    if budget.owner is not None:
        left = {
            rank: -(-number * held // len(worth)) for rank, held in enumerate(torch.bincount(budget.owner).tolist())
        }
        within = torch.zeros_like(is_loaded)
        for expert in order.tolist():
            rank = int(budget.owner[expert])
            within[expert], left[rank] = left[rank] > 0, left[rank] - 1
        if not budget.balance:
            return within | is_loaded
        order = _best(torch.where(within, worth, worth * (1 - budget.balance)))
    return is_loaded.scatter(0, order[:number], value=True)


def room_for(logits: torch.Tensor, router: Router) -> Routed:
    """Return tensors for the choices of ``logits`` [T, E], not written."""
    shape, device = (len(logits), router.top_k), logits.device
    return Routed(
        torch.empty(shape, dtype=torch.int64, device=device),
        torch.empty(shape, dtype=router.dtype, device=device),
        torch.empty(shape[:1], dtype=torch.float32, device=device),
    )
