"""A router's choice on a GPU in one launch: affinities, top-k, and the choice again within a budget of experts.

One program for each group of rows that shares a list of experts: steps have few rows, so that what a choice costs is
launches. It passes over its rows twice: for what they want, and for what they get. Where a list is shared between
ranks there are two launches, and the caller's sum over ranks between them.

Where a router limits rows to groups of experts, each group begins at a place that is a multiple of a power of two, so
that rows of places are cut into groups without being moved.

Shapes: T rows, E experts, K experts per row, G groups; in kernels N rows at a time, E places of experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .routing_rules import SCORES, GroupLimit, KeptExperts, Reduce, Routed, Router, room_for

_ROWS = 8
"""Rows that a program takes at a time."""
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def route(
    logits: torch.Tensor,
    router: Router,
    bias: torch.Tensor | None = None,
    budget: KeptExperts | None = None,
    valid: torch.Tensor | None = None,
    reduce: Reduce | None = None,
    scales: torch.Tensor | None = None,
) -> Routed:
    """Choose experts for rows of ``logits`` [T, E]; ``bias`` [E] is added to affinities for the choice alone.

    ``scales`` [E]: what the weights of each expert are multiplied by, besides the router's one scale.

    Rows that are not ``valid`` [T] bool get no expert and count nowhere. ``reduce``: what a group's rows are worth is
    summed over all ranks, in one call with [2, G, E] f32.
    """
    num_rows, num_experts = logits.shape
    routed = room_for(logits, router)
    num_groups = triton.cdiv(num_rows, _ROWS) if budget is None else budget.num_groups
    if not num_rows:
        assert reduce is None, "all ranks run as many rows"
        return routed
    rows_each = _ROWS if budget is None else num_rows // num_groups
    limit = router.limit or GroupLimit(1, 1, 0)
    width = triton.next_power_of_2(num_experts // limit.num_groups)
    places = triton.next_power_of_2(limit.num_groups) * width
    # What experts are worth, and whether they are loaded anyway
    worth = None if budget is None else logits.new_empty(2, num_groups, num_experts, dtype=torch.float32)
    phases = ((True, True),) if reduce is None else ((True, False), (False, True))
    for weighs, chooses in phases:
        if chooses and not weighs:
            assert reduce is not None
            assert worth is not None, "there is a budget to sum for"
            reduce(worth)
        _route[(num_groups,)](
            logits.contiguous(),
            bias,
            scales,
            valid,
            None if budget is None else budget.budgeted,
            None if budget is None else budget.reach,
            None if budget is None else budget.num_experts,
            None if budget is None else budget.owner,
            worth,
            routed.ids,
            routed.weights,
            routed.kept,
            num_rows,
            rows_each,
            num_experts,
            router.scale,
            0.0 if budget is None else budget.coverage,
            0.0 if budget is None else 1 - budget.balance,
            SIGMOID=router.sigmoid,
            BY_LOGITS=router.by_logits,
            NORMALISE=router.normalise,
            SCORE=-1 if budget is None else SCORES.index(budget.score),
            RULE=0 if budget is None else budget.rule,
            TRUNCATES=budget is not None and budget.truncates,
            WEIGHS=weighs and budget is not None,
            CHOOSES=chooses,
            TOP_K=router.top_k,
            COLUMNS=triton.next_power_of_2(router.top_k),
            EXPERT_GROUPS=limit.num_groups,
            GROUPS_KEPT=limit.num_kept,
            GROUP_BEST=limit.num_best,
            ZEROS_OUTSIDE=limit.outside == 0,
            WIDTH=width,
            EXPERTS=places,
            ROWS=_ROWS,
            OTHERS=16 if places <= 128 else 8,
            num_warps=4,
        )
    return routed


@triton.jit
def _affinities(numbers, is_number, SIGMOID: tl.constexpr):
    """Return [N, E] f32, 0 where there is no number."""
    if SIGMOID:
        affinities = tl.sigmoid(numbers)
    else:
        largest = tl.max(numbers, axis=1)[:, None]
        # A row that is not there is all -inf, and -inf less itself is not a number
        powers = tl.exp(numbers - tl.where(largest == float("-inf"), 0.0, largest))
        affinities = powers / tl.maximum(tl.sum(powers, axis=1), 1e-37)[:, None]
    return tl.where(is_number, affinities, 0.0)


@triton.jit
def _read(logits, lift, rows, is_row, experts, is_expert, num_experts, SIGMOID: tl.constexpr, BY_LOGITS: tl.constexpr):
    """Return affinities and scores [N, E]; -inf where there is no expert."""
    places = rows.to(tl.int64)[:, None] * num_experts + experts[None, :]
    is_number = is_row[:, None] & is_expert[None, :]
    numbers = tl.load(logits + places, mask=is_number, other=float("-inf")).to(tl.float32)
    affinities = _affinities(numbers, is_number, SIGMOID)
    scores = affinities
    if BY_LOGITS:
        scores = tl.where(is_row[:, None], numbers, 0.0)
    return affinities, tl.where(is_expert[None, :], scores + lift[None, :], float("-inf"))


@triton.jit
def _inside(
    scores, EXPERT_GROUPS: tl.constexpr, GROUPS_KEPT: tl.constexpr, GROUP_BEST: tl.constexpr, WIDTH: tl.constexpr
):
    """Return [N, E] bool: which places are of their row's groups."""
    num_blocks: tl.constexpr = scores.shape[1] // WIDTH
    blocks = tl.reshape(scores, [scores.shape[0], num_blocks, WIDTH])
    worth = tl.max(blocks, axis=2)
    if GROUP_BEST == 2:
        is_best = tl.arange(0, WIDTH)[None, None, :] == tl.argmax(blocks, axis=2)[:, :, None]
        worth += tl.max(tl.where(is_best, float("-inf"), blocks), axis=2)
    groups = tl.arange(0, num_blocks)
    worth = tl.where(groups[None, :] < EXPERT_GROUPS, tl.maximum(worth, _LOWEST), float("-inf"))
    stays = worth != worth
    for _ in tl.static_range(GROUPS_KEPT):
        best = tl.argmax(tl.where(stays, float("-inf"), worth), axis=1)
        stays = stays | (groups[None, :] == best[:, None])
    return tl.reshape(tl.broadcast_to(stays[:, :, None], blocks.shape), scores.shape)


@triton.jit
def _best_of(scores, affinities, is_expert, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
    """Return places and affinities [N, K] of the highest ``scores`` [N, E], and where those are in [N, E]."""
    columns = tl.arange(0, COLUMNS)
    places = tl.arange(0, scores.shape[1])
    # Below any that may be chosen: places without experts, and those that have been
    scores = tl.where(is_expert[None, :], tl.maximum(scores, _LOWEST), float("-inf"))
    chosen = tl.zeros([scores.shape[0], COLUMNS], dtype=tl.int32)
    found = tl.zeros([scores.shape[0], COLUMNS], dtype=tl.float32)
    is_chosen = scores != scores
    for k in tl.static_range(TOP_K):
        best = tl.argmax(tl.where(is_chosen, float("-inf"), scores), axis=1)
        is_best = places[None, :] == best[:, None]
        affinity = tl.sum(tl.where(is_best, affinities, 0.0), axis=1)
        chosen = tl.where(columns[None, :] == k, best[:, None], chosen)
        found = tl.where(columns[None, :] == k, affinity[:, None], found)
        is_chosen = is_chosen | is_best
    return chosen, found, is_chosen


@triton.jit
def _limited_order(scores, affinities, is_inside, is_expert, ZEROS_OUTSIDE: tl.constexpr):
    """Return what rows choose by [N, E] within a budget, which outranks their groups."""
    scores = tl.where(is_inside, scores, 0.0 if ZEROS_OUTSIDE else float("-inf"))
    is_outside = (scores == float("-inf")) | ((scores == 0) & (affinities > 0))
    lowest = tl.min(tl.where(is_outside | (is_expert == 0)[None, :], float("inf"), scores), axis=1)
    return tl.where(is_outside, lowest[:, None] - 2 + affinities, scores)


@triton.jit
def _order(
    importance, worth, loaded, owner, experts, num_experts, RULE: tl.constexpr, EXPERTS: tl.constexpr,
    OTHERS: tl.constexpr,
):  # fmt: skip
    """Return each expert's place [E] in the order of worth, by counting those before it, and what those are worth.

    Under the rules that know of ranks, among its rank's, and in the place of worth how many its rank holds.
    """
    key = importance
    if RULE == 1:
        key = tl.where(tl.load(loaded + experts, mask=experts < num_experts, other=0.0) > 0, float("inf"), importance)
    mine = experts
    if RULE >= 2:
        mine = tl.load(owner + experts, mask=experts < num_experts, other=-1)
    place = tl.zeros([EXPERTS], dtype=tl.int32)
    besides = tl.zeros([EXPERTS], dtype=tl.float32)
    for first in range(0, num_experts, OTHERS):
        others = first + tl.arange(0, OTHERS)
        is_other = others < num_experts
        theirs = tl.load(worth + others, mask=is_other, other=-1.0)
        their_key = theirs
        if RULE == 1:
            their_key = tl.where(tl.load(loaded + others, mask=is_other, other=0.0) > 0, float("inf"), theirs)
        is_before = (their_key[None, :] > key[:, None]) | (
            (their_key[None, :] == key[:, None]) & (others[None, :] < experts[:, None])
        )
        if RULE >= 2:
            is_with = tl.load(owner + others, mask=is_other, other=-2)[None, :] == mine[:, None]
            is_before = is_before & is_with
            besides += tl.sum(is_with.to(tl.float32), axis=1)
        else:
            besides += tl.sum(tl.where(is_before, theirs[None, :], 0.0), axis=1)
        place += tl.sum((is_before & is_other[None, :]).to(tl.int32), axis=1)
    return place, besides


@triton.jit
def _route(
    logits,
    bias,
    scales,
    valid,
    budgeted,
    reach,
    num_kept,
    owner,
    worth,
    ids,
    weights,
    kept,
    num_rows,
    rows_each,
    num_experts,
    scale,
    coverage,
    beyond_part,
    SIGMOID: tl.constexpr,
    BY_LOGITS: tl.constexpr,
    NORMALISE: tl.constexpr,
    SCORE: tl.constexpr,
    RULE: tl.constexpr,
    TRUNCATES: tl.constexpr,
    WEIGHS: tl.constexpr,
    CHOOSES: tl.constexpr,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXPERT_GROUPS: tl.constexpr,
    GROUPS_KEPT: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    ZEROS_OUTSIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
):
    group = tl.program_id(0)
    start = group * rows_each
    stop = tl.minimum(start + rows_each, num_rows)
    group_size = num_experts // EXPERT_GROUPS
    experts = tl.arange(0, EXPERTS) // WIDTH * group_size + tl.arange(0, EXPERTS) % WIDTH
    is_expert = (tl.arange(0, EXPERTS) // WIDTH < EXPERT_GROUPS) & (tl.arange(0, EXPERTS) % WIDTH < group_size)
    experts = tl.where(is_expert, experts, num_experts)
    columns = tl.arange(0, COLUMNS)
    lift = tl.zeros([EXPERTS], dtype=tl.float32)
    if bias is not None:
        lift = tl.load(bias + experts, mask=is_expert, other=0.0).to(tl.float32)
    if SCORE >= 0:
        loaded = worth + (tl.num_programs(0) + group) * num_experts
        worth += group * num_experts

    if WEIGHS:
        importance = tl.zeros([EXPERTS], dtype=tl.float32)
        is_loaded = tl.zeros([EXPERTS], dtype=tl.int32)
        for first in range(start, stop, ROWS):
            rows = first + tl.arange(0, ROWS)
            is_row = rows < stop
            is_budgeted = is_row & (tl.load(budgeted + rows, mask=is_row, other=0) != 0)
            is_other = is_row & (is_budgeted == 0)
            if valid is not None:
                is_other = is_other & (tl.load(valid + rows, mask=is_row, other=0) != 0)
            affinities, scores = _read(
                logits, lift, rows, is_row, experts, is_expert, num_experts, SIGMOID, BY_LOGITS
            )  # fmt: skip
            if EXPERT_GROUPS > 1:
                is_inside = _inside(scores, EXPERT_GROUPS, GROUPS_KEPT, GROUP_BEST, WIDTH)
                scores = tl.where(is_inside, scores, float("-inf"))
            _, own, is_chosen = _best_of(scores, affinities, is_expert, TOP_K, COLUMNS)
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
            is_loaded = tl.maximum(is_loaded, tl.max((is_chosen & is_other[:, None]).to(tl.int32), axis=0))
        tl.store(worth + experts, importance, mask=is_expert)
        tl.store(loaded + experts, is_loaded.to(tl.float32), mask=is_expert)
        tl.debug_barrier()

    if CHOOSES:
        allowed = is_expert
        if SCORE >= 0:
            # Worth goes through memory: every thread compares its experts with all others
            importance = tl.load(worth + experts, mask=is_expert, other=-1.0)
            place, besides = _order(
                importance, worth, loaded, owner, experts, num_experts, RULE, EXPERTS, OTHERS
            )  # fmt: skip
            if RULE == 1:
                total = tl.sum(tl.where(is_expert, importance, 0.0), axis=0)
                allowed = (besides < coverage * total) | (place < TOP_K)
            else:
                number = tl.load(num_kept).to(tl.int32)
                if RULE >= 2:
                    part = (number * besides.to(tl.int32) + num_experts - 1) // num_experts
                    allowed = place < part
                if RULE == 3:
                    importance = tl.where(allowed, importance, importance * beyond_part)
                    tl.debug_barrier()
                    tl.store(worth + experts, importance, mask=is_expert)
                    tl.debug_barrier()
                    importance = tl.load(worth + experts, mask=is_expert, other=-1.0)
                    place, besides = _order(
                        importance, worth, loaded, owner, experts, num_experts, 0, EXPERTS, OTHERS
                    )  # fmt: skip
                if RULE != 2:
                    allowed = place < number
            is_loaded = tl.load(loaded + experts, mask=is_expert, other=0.0) > 0
            allowed = is_expert & (allowed | is_loaded)
            # The list goes through memory too, for whoever asks of a single expert
            tl.debug_barrier()
            tl.store(loaded + experts, allowed.to(tl.float32), mask=is_expert)
            tl.debug_barrier()

        for first in range(start, stop, ROWS):
            rows = first + tl.arange(0, ROWS)
            is_row = rows < stop
            affinities, scores = _read(
                logits, lift, rows, is_row, experts, is_expert, num_experts, SIGMOID, BY_LOGITS
            )  # fmt: skip
            own_scores = scores
            if EXPERT_GROUPS > 1:
                is_inside = _inside(scores, EXPERT_GROUPS, GROUPS_KEPT, GROUP_BEST, WIDTH)
                own_scores = tl.where(is_inside, scores, float("-inf"))
            chosen, shares, _ = _best_of(own_scores, affinities, is_expert, TOP_K, COLUMNS)
            share = tl.full([ROWS], 1.0, dtype=tl.float32)
            is_none = chosen < 0
            if SCORE >= 0:
                is_budgeted = is_row & (tl.load(budgeted + rows, mask=is_row, other=0) != 0)
                listed = tl.load(loaded + chosen // WIDTH * group_size + chosen % WIDTH)
                is_unlisted = is_budgeted[:, None] & (listed == 0) & (columns < TOP_K)[None, :]
                left = tl.sum(tl.where(is_unlisted, 0.0, shares), axis=1)
                share = tl.where(is_budgeted, left / tl.maximum(tl.sum(shares, axis=1), 1e-37), 1.0)
                if TRUNCATES:
                    is_none = is_unlisted
                else:
                    order = own_scores
                    if EXPERT_GROUPS > 1:
                        loses = tl.max(is_unlisted.to(tl.int32), axis=1) > 0
                        limited = _limited_order(scores, affinities, is_inside, is_expert, ZEROS_OUTSIDE)
                        order = tl.where(loses[:, None], limited, order)
                    order = tl.where(is_budgeted[:, None] & (allowed == 0)[None, :], float("-inf"), order)
                    chosen, shares, _ = _best_of(order, affinities, is_expert, TOP_K, COLUMNS)
            if NORMALISE:
                shares = shares / tl.maximum(tl.sum(shares, axis=1), 1e-37)[:, None]
            chosen = chosen // WIDTH * group_size + chosen % WIDTH
            if scales is not None:
                shares *= tl.load(scales + chosen).to(tl.float32)
            if valid is not None:
                is_none = is_none | (tl.load(valid + rows, mask=is_row, other=0) == 0)[:, None]
            chosen = tl.where(is_none, num_experts, chosen)
            places = rows.to(tl.int64)[:, None] * TOP_K + columns[None, :]
            is_place = is_row[:, None] & (columns < TOP_K)[None, :]
            tl.store(ids + places, chosen.to(tl.int64), mask=is_place)
            tl.store(weights + places, (shares * scale).to(weights.dtype.element_ty), mask=is_place)
            tl.store(kept + rows, share, mask=is_row)
