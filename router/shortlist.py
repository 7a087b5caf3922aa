"""Which experts a group keeps, by what they are worth to it and what is loaded anyway.

Of experts that are worth the same the one with the lowest id comes first.

Shapes: G groups, E experts. ``importance`` [G, E] f32, none negative; ``loaded`` [G, E] bool. All return [G, E] bool.
Numbers of experts may be on the device, [1] int64, where a graph is to read them.
"""

from __future__ import annotations

import torch

from .order import best_first


def most_important(importance: torch.Tensor, loaded: torch.Tensor, num_experts: int | torch.Tensor) -> torch.Tensor:
    """Keep the ``num_experts`` that are worth most, and what is loaded anyway: batch-mates take nobody's place."""
    order = best_first(importance)
    if isinstance(num_experts, torch.Tensor):
        is_kept = (torch.arange(order.shape[1], device=order.device) < num_experts).expand_as(order)
        return torch.zeros_like(loaded).scatter(1, order, is_kept) | loaded
    return loaded.scatter(1, order[:, :num_experts], value=True)


def most_important_of_owners(
    importance: torch.Tensor, loaded: torch.Tensor, num_experts: int | torch.Tensor, owner: torch.Tensor, num_ranks: int
) -> torch.Tensor:
    """Keep on every rank its part of ``num_experts``, rounded up, and what is loaded anyway.

    No rank then computes much more than others. ``owner`` [E]: the rank of each expert.
    """
    order = best_first(importance)
    is_part = _is_part(order, num_experts, owner, num_ranks)
    return torch.zeros_like(loaded).scatter(1, order, is_part) | loaded


def discounted(
    importance: torch.Tensor, num_experts: int | torch.Tensor, owner: torch.Tensor, num_ranks: int, balance: float
) -> torch.Tensor:
    """Return ``importance``, less the share ``balance`` for experts beyond their rank's part of ``num_experts``.

    The list of those that are then worth most is nearly even, and leaves out nothing that much depends on.
    """
    order = best_first(importance)
    worth = importance.gather(1, order)
    worth = torch.where(_is_part(order, num_experts, owner, num_ranks), worth, worth * (1 - balance))
    return torch.empty_like(importance).scatter(1, order, worth)


def _is_part(order: torch.Tensor, num_experts: int | torch.Tensor, owner: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Return [G, E] bool: whether each expert of ``order`` [G, E], best first, is within its rank's part."""
    held = owner.new_zeros(num_ranks).index_add_(0, owner, torch.ones_like(owner))
    limits = -(-num_experts * held // owner.shape[0])
    owners = owner[order]
    is_of = owners[:, :, None] == torch.arange(num_ranks, device=owner.device)
    place = is_of.cumsum(dim=1).gather(2, owners[:, :, None])[:, :, 0]  # 1 for the best of its owner
    return place <= limits[owners]


def covering(importance: torch.Tensor, loaded: torch.Tensor, coverage: float, min_experts: int) -> torch.Tensor:
    """Keep what is loaded anyway and the fewest others, ``min_experts`` in all at least, to hold ``coverage``."""
    order = best_first(importance.masked_fill(loaded, torch.inf))
    ranked = importance.gather(1, order)
    reached = ranked.cumsum(dim=1)
    wanted = reached - ranked < coverage * reached[:, -1:]
    wanted[:, :min_experts] = True
    return torch.zeros_like(loaded).scatter(1, order, wanted) | loaded
