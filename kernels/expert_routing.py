"""A router's choice on a GPU in one launch: affinities, top-k, and the choice again within a budget of experts.

One program for each group of rows that shares a list of experts: steps have few rows, so that what a choice costs is
launches. It passes over its rows twice: for what they want, and for what they get.

Shapes: T rows, E experts, K experts per row, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

SCORES = ("probabilities", "selected", "squared", "survival")
_ROWS = 8
"""Rows that a program takes at a time."""


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


@dataclass(frozen=True, slots=True)
class KeptExperts:
    """A budget: a fixed number of experts for each group of rows, in whose list rows choose again."""

    num_experts: int
    score: str
    """One of `SCORES`."""
    groups: torch.Tensor
    """[T] int64 in [0, num_groups)"""
    num_groups: int
    budgeted: torch.Tensor
    """[T] bool; experts of other rows are loaded anyway, and may be used."""
    valid: torch.Tensor
    """[T] bool, False on padding rows."""
    reach: torch.Tensor
    """[T] f32: the probability that a row's token is used."""


@dataclass(frozen=True, slots=True)
class Routed:
    """The choice; of experts with equal scores the one with the lowest id comes first."""

    ids: torch.Tensor
    """[T, K] int64"""
    weights: torch.Tensor
    """[T, K] f32"""
    kept: torch.Tensor
    """[T] f32: the share of its own choice's weight that a row's budget left it."""


def route(logits: torch.Tensor, router: Router, bias: torch.Tensor | None, budget: KeptExperts | None) -> Routed:
    """Choose experts for rows of ``logits`` [T, E]; ``bias`` [E] is added to affinities for the choice alone."""
    num_rows, num_experts = logits.shape
    routed = _empty(logits, router)
    num_groups = 1 if budget is None else budget.num_groups
    worth = torch.empty(num_groups, num_experts, dtype=torch.float32, device=logits.device)
    if num_rows:
        _route[(num_groups,)](
            logits.contiguous(),
            bias,
            None if budget is None else budget.groups,
            None if budget is None else budget.budgeted,
            None if budget is None else budget.valid,
            None if budget is None else budget.reach,
            worth,
            routed.ids,
            routed.weights,
            routed.kept,
            num_rows,
            num_experts,
            0 if budget is None else budget.num_experts,
            router.scale,
            SIGMOID=router.sigmoid,
            NORMALISE=router.normalise,
            SCORE=-1 if budget is None else SCORES.index(budget.score),
            TOP_K=router.top_k,
            COLUMNS=triton.next_power_of_2(router.top_k),
            EXPERTS=triton.next_power_of_2(num_experts),
            ROWS=_ROWS,
            OTHERS=16,
            num_warps=4,
        )
    return routed


def route_reference(
    logits: torch.Tensor, router: Router, bias: torch.Tensor | None, budget: KeptExperts | None
) -> Routed:
    """Do the same in torch's operations, on the host."""
    routed = _empty(logits, router)
    affinities = logits.float().sigmoid() if router.sigmoid else logits.float().softmax(dim=-1)
    scores = affinities if bias is None else affinities + bias.float()

    def best(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.argsort(dim=-1, descending=True, stable=True)

    ids = best(scores)[:, : router.top_k]
    routed.kept.fill_(1.0)
    if budget is not None:
        own = affinities.gather(1, ids)
        shares = own / own.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        for group in range(budget.num_groups):
            is_mine = budget.groups == group
            counted, others = is_mine & budget.budgeted, is_mine & ~budget.budgeted & budget.valid
            worth = affinities.new_zeros(affinities.shape)
            if budget.score == "probabilities":
                worth = affinities / affinities.sum(dim=1, keepdim=True)
            else:
                squares = {"selected": shares, "squared": shares**2, "survival": shares**2 * budget.reach[:, None]}
                worth = worth.scatter(1, ids, squares[budget.score])
            allowed = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
            allowed[best(worth[counted].sum(dim=0))[: budget.num_experts]] = True
            allowed[ids[others].flatten()] = True
            routed.kept[counted] = (shares * allowed[ids])[counted].sum(dim=1)
            ids = torch.where(counted[:, None], best(scores.masked_fill(~allowed, -torch.inf))[:, : router.top_k], ids)
    weights = affinities.gather(1, ids)
    if router.normalise:
        weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    routed.ids.copy_(ids)
    routed.weights.copy_(weights * router.scale)
    return routed


def _empty(logits: torch.Tensor, router: Router) -> Routed:
    shape, device = (len(logits), router.top_k), logits.device
    return Routed(
        torch.empty(shape, dtype=torch.int64, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(shape[:1], dtype=torch.float32, device=device),
    )


@triton.jit
def _affinities(logits, rows, experts, is_number, num_experts, SIGMOID: tl.constexpr):
    """Return [N, E] f32, 0 where there is no number."""
    places = rows.to(tl.int64)[:, None] * num_experts + experts[None, :]
    numbers = tl.load(logits + places, mask=is_number, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        affinities = tl.sigmoid(numbers)
    else:
        largest = tl.max(numbers, axis=1)[:, None]
        # A row that is not there is all -inf, and -inf less itself is not a number
        powers = tl.exp(numbers - tl.where(largest == float("-inf"), 0.0, largest))
        affinities = powers / tl.maximum(tl.sum(powers, axis=1), 1e-37)[:, None]
    return tl.where(is_number, affinities, 0.0)


@triton.jit
def _best(scores, affinities, experts, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the ids and affinities [N, K] of the highest ``scores`` [N, E], and where those are in [N, E]."""
    columns = tl.arange(0, COLUMNS)
    ids = tl.zeros([scores.shape[0], COLUMNS], dtype=tl.int32)
    found = tl.zeros([scores.shape[0], COLUMNS], dtype=tl.float32)
    is_chosen = scores != scores
    for k in tl.static_range(TOP_K):
        best = tl.argmax(tl.where(is_chosen, float("-inf"), scores), axis=1)
        is_best = experts[None, :] == best[:, None]
        affinity = tl.sum(tl.where(is_best, affinities, 0.0), axis=1)
        ids = tl.where(columns[None, :] == k, best[:, None], ids)
        found = tl.where(columns[None, :] == k, affinity[:, None], found)
        is_chosen = is_chosen | is_best
    return ids, found, is_chosen


@triton.jit
def _route(
    logits,
    bias,
    groups,
    budgeted,
    valid,
    reach,
    worth,
    ids,
    weights,
    kept,
    num_rows,
    num_experts,
    num_kept,
    scale,
    SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
    SCORE: tl.constexpr,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
):
    group = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    is_expert = experts < num_experts
    columns = tl.arange(0, COLUMNS)
    lift = tl.zeros([EXPERTS], dtype=tl.float32)
    if bias is not None:
        lift = tl.load(bias + experts, mask=is_expert, other=0.0).to(tl.float32)

    allowed = experts < num_experts
    if SCORE >= 0:
        importance = tl.zeros([EXPERTS], dtype=tl.float32)
        loaded = tl.zeros([EXPERTS], dtype=tl.int32)
        for first in range(0, num_rows, ROWS):
            rows = first + tl.arange(0, ROWS)
            is_row = rows < num_rows
            is_mine = is_row & (tl.load(groups + rows, mask=is_row, other=-1) == group)
            is_budgeted = is_mine & (tl.load(budgeted + rows, mask=is_row, other=0) != 0)
            is_other = is_mine & (is_budgeted == 0) & (tl.load(valid + rows, mask=is_row, other=0) != 0)
            is_number = is_row[:, None] & is_expert[None, :]
            affinities = _affinities(logits, rows, experts, is_number, num_experts, SIGMOID)
            scores = tl.where(is_expert[None, :], affinities + lift[None, :], float("-inf"))
            _, own, is_chosen = _best(scores, affinities, experts, TOP_K, COLUMNS)
            if SCORE == 0:
                shares = affinities / tl.maximum(tl.sum(affinities, axis=1), 1e-37)[:, None]
            else:
                shares = tl.where(is_chosen, affinities, 0.0)
                shares = shares / tl.maximum(tl.sum(own, axis=1), 1e-37)[:, None]
                if SCORE >= 2:
                    shares = shares * shares
                if SCORE == 3:
                    shares = shares * tl.load(reach + rows, mask=is_row, other=0.0)[:, None]
            importance += tl.sum(tl.where(is_budgeted[:, None], shares, 0.0), axis=0)
            loaded = tl.maximum(loaded, tl.max((is_chosen & is_other[:, None]).to(tl.int32), axis=0))
        # Each expert's place in the order, by counting those before it: what they are worth goes through memory
        tl.store(worth + group * num_experts + experts, importance, mask=is_expert)
        tl.debug_barrier()
        importance = tl.load(worth + group * num_experts + experts, mask=is_expert, other=-1.0)
        place = tl.zeros([EXPERTS], dtype=tl.int32)
        for first in range(0, num_experts, OTHERS):
            others = first + tl.arange(0, OTHERS)
            theirs = tl.load(worth + group * num_experts + others, mask=others < num_experts, other=-1.0)[None, :]
            is_before = (theirs > importance[:, None]) | (
                (theirs == importance[:, None]) & (others[None, :] < experts[:, None])
            )
            place += tl.sum(is_before.to(tl.int32), axis=1)
        allowed = is_expert & ((place < num_kept) | (loaded > 0))

    for first in range(0, num_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        is_row = rows < num_rows
        is_number = is_row[:, None] & is_expert[None, :]
        affinities = _affinities(logits, rows, experts, is_number, num_experts, SIGMOID)
        scores = tl.where(is_expert[None, :], affinities + lift[None, :], float("-inf"))
        share = tl.full([ROWS], 1.0, dtype=tl.float32)
        if SCORE >= 0:
            is_row = is_row & (tl.load(groups + rows, mask=is_row, other=-1) == group)
            is_budgeted = is_row & (tl.load(budgeted + rows, mask=is_row, other=0) != 0)
            _, own, is_chosen = _best(scores, affinities, experts, TOP_K, COLUMNS)
            left = tl.sum(tl.where(is_chosen & allowed[None, :], affinities, 0.0), axis=1)
            left = left / tl.maximum(tl.sum(own, axis=1), 1e-37)
            share = tl.where(is_budgeted, left, 1.0)
            is_barred = is_budgeted[:, None] & (allowed[None, :] == 0)
            scores = tl.where(is_barred, float("-inf"), scores)
        chosen, shares, _ = _best(scores, affinities, experts, TOP_K, COLUMNS)
        if NORMALISE:
            shares = shares / tl.maximum(tl.sum(shares, axis=1), 1e-37)[:, None]
        places = rows.to(tl.int64)[:, None] * TOP_K + columns[None, :]
        is_place = is_row[:, None] & (columns < TOP_K)[None, :]
        tl.store(ids + places, chosen.to(tl.int64), mask=is_place)
        tl.store(weights + places, shares * scale, mask=is_place)
        tl.store(kept + rows, share, mask=is_row)
