"""Which rank holds which expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Placement:
    """Expert -> rank map of one model; every MoE layer uses the same.

    Experts keep their global ids everywhere but inside a rank's own weights, where they are numbered in the order of
    ``experts_of(rank)``. Id ``num_experts`` is the sentinel "none"; it belongs to the rank that does not exist.
    """

    num_experts: int
    num_ranks: int
    owner: tuple[int, ...]
    """Rank of each expert [E]."""

    def experts_of(self, rank: int) -> list[int]:
        """Return the global ids that ``rank`` holds, ascending."""
        return [expert for expert, owner in enumerate(self.owner) if owner == rank]

    def owner_table(self) -> torch.Tensor:
        """Return [E + 1] int64: the owner of each id, ``num_ranks`` for the sentinel."""
        return torch.tensor([*self.owner, self.num_ranks])

    def local_ids(self) -> torch.Tensor:
        """Return [E + 1] int64: each id's number on its owner; 0 for the sentinel, which nobody owns."""
        local = torch.zeros(self.num_experts + 1, dtype=torch.int64)
        for rank in range(self.num_ranks):
            for number, expert in enumerate(self.experts_of(rank)):
                local[expert] = number
        return local


def contiguous(num_experts: int, num_ranks: int) -> Placement:
    """Split experts into equal runs, the first ranks taking one more when they do not divide.

    Raises ``ValueError`` when a rank would hold none.
    """
    if not 1 <= num_ranks <= num_experts:
        raise ValueError(f"expert_parallel_size: {num_ranks} is not in [1, {num_experts}], the model's experts")
    base, extra = divmod(num_experts, num_ranks)
    owner = [rank for rank in range(num_ranks) for _ in range(base + (rank < extra))]
    return Placement(num_experts, num_ranks, tuple(owner))
