"""Rows sorted by the experts that they chose, on the device: what a grouped product over few rows walks through.

The host learns nothing: it launches as many programs as any choice could need, and those beyond the device's own count
end at once. One launch, each of whose programs works by itself: those of pairs count how many pairs precede theirs,
which is a stable sort without an exchange, and one more counts the experts.

Shapes: T rows, K experts per row, P = T x K pairs of row and expert, E experts held here, W tiles at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_PAIRS = 64
_OTHERS = 64


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """The pairs of each active expert in a row, cut into tiles of at most so many rows."""

    order: torch.Tensor
    """[P] int32: pairs by their expert, those of one expert by row; those of none come last."""
    tile_expert: torch.Tensor
    """[W] int32: where the tile's expert lies; valid, as the other two, for the first ``counts[0]`` tiles."""
    tile_start: torch.Tensor
    """[W] int32: the tile's first place in ``order``."""
    tile_size: torch.Tensor
    """[W] int32: how many places it has."""
    counts: torch.Tensor
    """[2] int32: tiles, and active experts."""
    block_rows: int
    """Rows of a full tile."""


def most_tiles(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """Return how many tiles any choice of ``num_pairs`` experts can need."""
    active = min(num_pairs, num_experts)
    return active + (num_pairs - active) // block_rows


def group_by_expert(
    expert_ids: torch.Tensor, num_experts: int, block_rows: int, slots: torch.Tensor | None = None
) -> ExpertGroups:
    """Sort the pairs of ``expert_ids`` [T, K], where ``num_experts`` or more is "none".

    ``slots`` [E] int32: where each expert lies; by its number if None.
    """
    num_pairs = expert_ids.numel()
    groups = _empty(expert_ids, num_experts, block_rows)
    _group_pairs[(triton.cdiv(num_pairs, _PAIRS) + 1,)](
        expert_ids.contiguous(),
        slots,
        groups.order,
        groups.tile_expert,
        groups.tile_start,
        groups.tile_size,
        groups.counts,
        num_pairs,
        num_experts,
        BLOCK_ROWS=block_rows,
        PAIRS=_PAIRS,
        OTHERS=_OTHERS,
        BINS=triton.next_power_of_2(num_experts + 1),
        num_warps=4,
    )
    return groups


def group_by_expert_reference(
    expert_ids: torch.Tensor, num_experts: int, block_rows: int, slots: torch.Tensor | None = None
) -> ExpertGroups:
    """Do the same in torch's operations, on the host."""
    ids = expert_ids.flatten().clamp_max(num_experts)
    groups = _empty(expert_ids, num_experts, block_rows)
    groups.order.copy_(ids.argsort(stable=True))
    sizes = torch.bincount(ids, minlength=num_experts + 1)[:num_experts].tolist()
    tiles, start = [], 0
    for expert, size in enumerate(sizes):
        tiles += [(expert, start + cut, min(block_rows, size - cut)) for cut in range(0, size, block_rows)]
        start += size
    for place, (expert, first, size) in enumerate(tiles):
        groups.tile_expert[place] = expert if slots is None else slots[expert]
        groups.tile_start[place], groups.tile_size[place] = first, size
    groups.counts.copy_(torch.tensor([len(tiles), sum(size > 0 for size in sizes)]))
    return groups


def _empty(expert_ids: torch.Tensor, num_experts: int, block_rows: int) -> ExpertGroups:
    num_tiles = most_tiles(expert_ids.numel(), num_experts, block_rows)
    order, *tiles, counts = (
        torch.empty(size, dtype=torch.int32, device=expert_ids.device)
        for size in (expert_ids.numel(), num_tiles, num_tiles, num_tiles, 2)
    )
    return ExpertGroups(order, tiles[0], tiles[1], tiles[2], counts, block_rows)


@triton.jit
def _group_pairs(
    expert_ids,
    slots,
    order,
    tile_expert,
    tile_start,
    tile_size,
    counts,
    num_pairs,
    num_experts,
    BLOCK_ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    OTHERS: tl.constexpr,
    BINS: tl.constexpr,
):
    program = tl.program_id(0)
    if program < tl.num_programs(0) - 1:
        _place_pairs(expert_ids, order, program * PAIRS + tl.arange(0, PAIRS), num_pairs, num_experts, OTHERS)
    else:
        _cut_tiles(
            expert_ids, slots, tile_expert, tile_start, tile_size, counts, num_pairs, num_experts,
            BLOCK_ROWS, OTHERS, BINS,
        )  # fmt: skip


@triton.jit
def _place_pairs(expert_ids, order, pairs, num_pairs, num_experts, OTHERS: tl.constexpr):
    mine = tl.load(expert_ids + pairs, mask=pairs < num_pairs, other=num_experts)
    mine = tl.minimum(mine, num_experts).to(tl.int32)
    places = tl.zeros_like(pairs)
    for first in range(0, num_pairs, OTHERS):
        others = first + tl.arange(0, OTHERS)
        ids = tl.load(expert_ids + others, mask=others < num_pairs, other=num_experts)
        ids = tl.minimum(ids, num_experts).to(tl.int32)[None, :]
        is_before = (ids < mine[:, None]) | ((ids == mine[:, None]) & (others[None, :] < pairs[:, None]))
        places += tl.sum((is_before & (others < num_pairs)[None, :]).to(tl.int32), axis=1)
    tl.store(order + places, pairs, mask=pairs < num_pairs)


@triton.jit
def _cut_tiles(
    expert_ids,
    slots,
    tile_expert,
    tile_start,
    tile_size,
    counts,
    num_pairs,
    num_experts,
    BLOCK_ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
    BINS: tl.constexpr,
):
    sizes = tl.zeros([BINS], dtype=tl.int32)
    for first in range(0, num_pairs, OTHERS):
        others = first + tl.arange(0, OTHERS)
        ids = tl.load(expert_ids + others, mask=others < num_pairs, other=num_experts)
        sizes += tl.histogram(tl.minimum(ids, num_experts).to(tl.int32), BINS)
    experts = tl.arange(0, BINS)
    sizes = tl.where(experts < num_experts, sizes, 0)
    tiles = (sizes + BLOCK_ROWS - 1) // BLOCK_ROWS
    starts = tl.cumsum(sizes, axis=0) - sizes
    places = tl.cumsum(tiles, axis=0) - tiles
    lies = experts
    if slots is not None:
        lies = tl.load(slots + experts, mask=experts < num_experts, other=0)
    for cut in range(tl.max(tiles, axis=0)):
        is_tile = cut < tiles
        tl.store(tile_expert + places + cut, lies, mask=is_tile)
        tl.store(tile_start + places + cut, starts + cut * BLOCK_ROWS, mask=is_tile)
        tl.store(tile_size + places + cut, tl.minimum(sizes - cut * BLOCK_ROWS, BLOCK_ROWS), mask=is_tile)
    tl.store(counts, tl.sum(tiles, axis=0))
    tl.store(counts + 1, tl.sum((sizes > 0).to(tl.int32), axis=0))
