"""Balanced placement: every rank gets the same share of the work, hot experts on several ranks if they may be.

The greedy packing of DeepSeek's EPLB, per layer and without its groups of nodes: replicas go to the experts with most
rows per copy; copies, the busiest first, to the rank with the least to do so far.

Shapes: L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .placement import Placement, check_num_ranks, shares


def balanced(loads: np.ndarray, num_ranks: int, num_redundant_experts: int = 0) -> Placement:
    """Place experts by ``loads`` [L, E], the rows that chose each; all ranks hold as many experts, within one a layer.

    ``num_redundant_experts``: copies in every layer beside the first of each expert, none twice on a rank. Raises
    ``ValueError`` when a rank would hold no expert, or there are more copies than places for them.
    """
    num_experts = loads.shape[1]
    check_num_ranks(num_experts, num_ranks)
    most = num_experts * (num_ranks - 1)
    if not 0 <= num_redundant_experts <= most:
        raise ValueError(f"num_redundant_experts: {num_redundant_experts} is not in [0, {most}]")
    sizes = layer_sizes(len(loads), num_experts + num_redundant_experts, num_ranks)
    holders = []
    for layer_loads, layer_size in zip(loads, sizes, strict=True):
        holders.append(balanced_layer(layer_loads, layer_size, num_experts + num_redundant_experts))
    return Placement(num_experts, num_ranks, tuple(holders))


def balanced_layer(loads: np.ndarray, sizes: Sequence[int], num_copies: int) -> tuple[tuple[int, ...], ...]:
    """Return the ranks [E] of each expert of a layer by its ``loads`` [E]; ``sizes`` [R] sum to ``num_copies``."""
    return pack(loads, _num_copies(loads, len(sizes), num_copies - len(loads)), sizes)


def layer_sizes(num_layers: int, num_copies: int, num_ranks: int) -> list[list[int]]:
    """Return [L][R] how many experts a rank holds; what does not divide goes to other ranks in every layer."""
    even = shares(num_copies, num_ranks)
    starts = (layer * (num_copies % num_ranks) % num_ranks for layer in range(num_layers))
    return [even[-start:] + even[:-start] if start else even for start in starts]


def pack(loads: np.ndarray, copies: np.ndarray, sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the ranks [E] of each expert of a layer, by its ``loads`` and ``copies`` [E].

    ``sizes`` [R]: how many experts each rank takes.
    """
    per_copy = (loads / copies).tolist()
    held: list[set[int]] = [set() for _ in sizes]
    for expert in sorted(range(len(copies)), key=lambda e: -per_copy[e]):
        for _ in range(copies[expert]):
            open_ranks = [rank for rank, size in enumerate(sizes) if len(held[rank]) < size]
            free = [rank for rank in open_ranks if expert not in held[rank]]
            if free:
                rank = min(free, key=lambda r: sum(per_copy[e] for e in held[r]))
            else:
                rank = _make_room(expert, open_ranks[0], held, per_copy)
            held[rank].add(expert)
    return tuple(tuple(rank for rank in range(len(sizes)) if expert in held[rank]) for expert in range(len(copies)))


def _make_room(expert: int, open_rank: int, held: list[set[int]], per_copy: list[float]) -> int:
    """Move an expert to ``open_rank``, which has ``expert`` already, from a rank that has not; return that one.

    There is one: a full rank holds more experts than ``open_rank`` does beside ``expert``.
    """
    moves = [
        (abs(per_copy[other] - per_copy[expert]), rank, other)
        for rank, experts in enumerate(held)
        if expert not in experts
        for other in experts - held[open_rank]
    ]
    _, rank, other = min(moves)
    held[rank].remove(other)
    held[open_rank].add(other)
    return rank


def _num_copies(loads: np.ndarray, num_ranks: int, num_redundant: int) -> np.ndarray:
    """Return [E]: copies of each expert, at most one a rank."""
    copies = np.ones(len(loads), dtype=np.int64)
    for _ in range(num_redundant):
        copies[np.where(copies < num_ranks, loads / copies, -1.0).argmax()] += 1
    return copies
