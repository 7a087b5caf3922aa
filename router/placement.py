"""Which ranks hold which experts, layer by layer, and which of them a row goes to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Placement:
    """Expert -> ranks map of every MoE layer of one model. An expert that several ranks hold has replicas.

    Experts keep their global ids everywhere but inside a rank's own weights, where those of a layer are numbered in
    the order of ``experts_of(layer, rank)``. Id ``num_experts`` is the sentinel "none"; it belongs to the rank that
    does not exist. Where a row goes is decided by its own rank alone, never by the row: so nothing is counted or
    exchanged to decide it, and a request gives the same tokens each time it runs on a rank.
    """

    num_experts: int
    num_ranks: int
    holders: tuple[tuple[tuple[int, ...], ...], ...]
    """Per layer and expert [L][E]: the ranks that hold it, ascending, at least one."""

    def __post_init__(self) -> None:
        for layer in self.holders:
            assert len(layer) == self.num_experts
            for ranks in layer:
                self._check(ranks)

    def _check(self, ranks: tuple[int, ...]) -> None:
        assert ranks, "every expert is held"
        assert list(ranks) == sorted(set(ranks))
        assert 0 <= ranks[0] <= ranks[-1] < self.num_ranks

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return len(self.holders)

    def without(self, absent: Collection[int]) -> Placement | None:
        """Return it for the ranks that are left, numbered anew in their order; None if some expert has no holder then.

        What each of them holds, and in which order, stays.
        """
        if not absent:
            return self
        left = [rank for rank in range(self.num_ranks) if rank not in absent]
        number_of = {rank: number for number, rank in enumerate(left)}
        holders = tuple(
            tuple(tuple(number_of[rank] for rank in ranks if rank in number_of) for ranks in layer)
            for layer in self.holders
        )
        if not left or not all(ranks for layer in holders for ranks in layer):
            return None
        return Placement(self.num_experts, len(left), holders)

    def moved(self, layers: Mapping[int, Mapping[int, tuple[int, ...]]]) -> Placement:
        """Return this placement with other holders for some experts of some ``layers``.

        Costs what the changed layers do: steps wait for it.
        """
        holders = list(self.holders)
        for layer, changed in layers.items():
            ranks_of = list(holders[layer])
            for expert, ranks in changed.items():
                self._check(ranks)
                ranks_of[expert] = ranks
            holders[layer] = tuple(ranks_of)
        made = object.__new__(Placement)
        for name, value in (("num_experts", self.num_experts), ("num_ranks", self.num_ranks)):
            object.__setattr__(made, name, value)
        object.__setattr__(made, "holders", tuple(holders))
        return made

    def experts_of(self, layer: int, rank: int) -> list[int]:
        """Return the global ids of the layer's experts that ``rank`` holds, ascending."""
        return [expert for expert, ranks in enumerate(self.holders[layer]) if rank in ranks]

    def owner_table(self, layer: int, rank: int) -> torch.Tensor:
        """Return [E + 1] int64: the rank that rows of ``rank`` go to for each expert, ``num_ranks`` for the sentinel.

        Its own where that holds the expert. The ranks that do not are split into runs of neighbours, as equal as can
        be, one for each holder; the first run goes to another holder for each expert, so that ranks which hold the same
        experts share their rows.
        """
        return torch.tensor([*(self._owner(layer, expert, rank) for expert in range(self.num_experts)), self.num_ranks])

    def local_ids(self, layer: int, rank: int) -> torch.Tensor:
        """Return [E + 1] int64: each id's number on the rank that ``owner_table`` gives; 0 for the sentinel."""
        num_held = [0] * self.num_ranks
        local = []
        for expert, ranks in enumerate(self.holders[layer]):
            local.append(num_held[self._owner(layer, expert, rank)])
            for holder in ranks:
                num_held[holder] += 1
        return torch.tensor([*local, 0])

    def _owner(self, layer: int, expert: int, rank: int) -> int:
        return owner(self.holders[layer][expert], expert, rank, self.num_ranks)


def owner(ranks: tuple[int, ...], expert: int, rank: int, num_ranks: int) -> int:
    """Return which of an expert's holders ``ranks`` the rows of ``rank`` go to; see `Placement.owner_table`."""
    if rank in ranks:
        return rank
    place = rank - bisect_left(ranks, rank)  # among those that do not hold it
    run = place * len(ranks) // (num_ranks - len(ranks))
    return ranks[(expert + run) % len(ranks)]


@dataclass(frozen=True, slots=True)
class PlacementVersion:
    """A placement and its number; each switch raises that, and a number stands for one placement only."""

    number: int
    placement: Placement


def contiguous(num_layers: int, num_experts: int, num_ranks: int) -> Placement:
    """Split every layer's experts into equal runs, the first ranks taking one more when they do not divide.

    Raises ``ValueError`` when a rank would hold none.
    """
    check_num_ranks(num_experts, num_ranks)
    sizes = shares(num_experts, num_ranks)
    holders = tuple((rank,) for rank, size in enumerate(sizes) for _ in range(size))
    return Placement(num_experts, num_ranks, (holders,) * num_layers)


def check_num_ranks(num_experts: int, num_ranks: int) -> None:
    """Raise ``ValueError`` unless every rank can hold an expert of its own."""
    if not 1 <= num_ranks <= num_experts:
        raise ValueError(f"expert_parallel_size: {num_ranks} is not in [1, {num_experts}], the model's experts")


def shares(total: int, num_ranks: int) -> list[int]:
    """Return ``total`` split over the ranks: equal within one, the first ones taking more."""
    base, extra = divmod(total, num_ranks)
    return [base + (rank < extra) for rank in range(num_ranks)]
