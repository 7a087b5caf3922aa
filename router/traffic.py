"""Which other ranks a row is worth sending to.

Shapes: T rows, K experts per row, E experts, R ranks.
"""

from __future__ import annotations

import torch

from .order import best_first


def visited_ranks(
    ids: torch.Tensor,
    shares: torch.Tensor,
    owner: torch.Tensor,
    num_ranks: int,
    home: int,
    max_ranks: int | None,
    min_share: float,
) -> torch.Tensor:
    """Return [T, R] bool: the ranks that each row may use.

    Its own rank ``home`` costs nothing. Of the others it may visit at most ``max_ranks``, those with most of its
    weight, each with at least ``min_share`` of it; but the rank with most weight of all always, so that no row is left
    without experts. Of ranks with the same weight the lowest comes first. ``ids`` [T, K] with ``shares`` [T, K] is what
    the row would choose; ``owner`` [E].
    """
    weight = shares.new_zeros(len(ids), num_ranks).scatter_add_(1, owner[ids], shares)
    others = weight.clone()
    others[:, home] = -1.0
    nearest = best_first(others)[:, : num_ranks - 1 if max_ranks is None else min(max_ranks, num_ranks - 1)]
    shares_there = weight.gather(1, nearest)
    is_worth_it = (shares_there >= min_share) & (shares_there > 0)
    is_worth_it[:, 0] |= shares_there[:, 0] > weight[:, home]  # the best of all
    allowed = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, nearest, is_worth_it)
    allowed[:, home] = True
    return allowed
