"""Affine placement: experts that rows choose together lie on one rank, so that rows visit fewer ranks.

A row goes to a rank once, however many of its experts live there, so what counts is how many distinct ranks its K
experts lie on. Each layer by itself: ranks are grown from experts that share few rows, then pairs of experts on
different ranks are exchanged while that saves visits, exactly counted on the recorded rows. All ranks hold as many
experts, within one, and none gets more than a given multiple of the mean load.

Shapes: N rows, L MoE layers, K experts per row, E experts, R ranks.
"""

from __future__ import annotations

import numpy as np

from .balanced import layer_sizes, pack
from .placement import Placement, check_num_ranks

MAX_LOAD_IMBALANCE = 1.2
_MAX_ROWS = 16384
"""Rows that are counted: more hardly change the result, and take longer."""


def affine(
    ids: np.ndarray, num_experts: int, num_ranks: int, max_load_imbalance: float = MAX_LOAD_IMBALANCE
) -> Placement:
    """Place experts by the recorded choices ``ids`` [N, L, K].

    ``max_load_imbalance``: the busiest rank's load over the mean, at most; where greedy balancing alone does not keep
    to it in a layer (`balanced`), what that comes to. Raises ``ValueError`` when a rank would hold no expert.
    """
    check_num_ranks(num_experts, num_ranks)
    if not max_load_imbalance >= 1:
        raise ValueError(f"max_load_imbalance: {max_load_imbalance} is not in [1, inf)")
    rows = ids[:: -(-len(ids) // _MAX_ROWS)].astype(np.int64)
    sizes = layer_sizes(rows.shape[1], num_experts, num_ranks)
    holders = []
    for layer, layer_size in enumerate(sizes):
        owner = _Layer(rows[:, layer], num_experts, layer_size, max_load_imbalance).place()
        holders.append(tuple((rank,) for rank in owner.tolist()))
    return Placement(num_experts, num_ranks, tuple(holders))


class _Layer:
    """One layer's rows [N, K], and the search for the owner of each expert.

    Where experts do not divide, blanks that no row chooses, numbered behind them, fill every rank up to the same size:
    E counts them in, and an exchange with a blank moves an expert. No rank has two.
    """

    def __init__(self, ids: np.ndarray, num_experts: int, sizes: list[int], max_load_imbalance: float) -> None:
        self.ids, self.num_experts, self.num_ranks, self.size = ids, num_experts, len(sizes), max(sizes)
        self.blanks = [rank for rank, size in enumerate(sizes) if size < self.size]
        self.num_slots = self.size * self.num_ranks
        self.is_blank = np.arange(self.num_slots) >= num_experts
        self.loads = np.bincount(ids.ravel(), minlength=self.num_slots)
        # Every two experts of a row, itself included
        self.pairs = (ids[:, :, None] * self.num_slots + ids[:, None, :]).ravel()
        self.together = self._count_pairs(None)
        ones = np.ones(num_experts, dtype=np.int64)
        self.even = np.append(np.array(pack(self.loads[:num_experts], ones, sizes))[:, 0], self.blanks).astype(np.int64)
        mean = self.loads.sum() / self.num_ranks
        self.limit = max(max_load_imbalance * mean, self._rank_loads(self.even).max())

    def place(self) -> np.ndarray:
        """Return the rank of each expert, blanks left out; none is loaded beyond the limit."""
        owner = self._unload(self._grow())
        is_within = self._rank_loads(owner).max() <= self.limit
        return self._refine(owner if is_within else self.even)[: self.num_experts]

    def _count_pairs(self, weights: np.ndarray | None) -> np.ndarray:
        return np.bincount(self.pairs, weights, minlength=self.num_slots**2).reshape(self.num_slots, self.num_slots)

    def _rank_loads(self, owner: np.ndarray) -> np.ndarray:
        return np.bincount(owner, weights=self.loads, minlength=self.num_ranks)

    def _loads_after(self, owner: np.ndarray) -> np.ndarray:
        """Return [E, E]: the load of the first one's rank once two experts are exchanged."""
        return self._rank_loads(owner)[owner][:, None] - self.loads[:, None] + self.loads

    def _may_exchange(self, owner: np.ndarray) -> np.ndarray:
        """Return [E, E] bool: two experts of different ranks, neither of which comes to two blanks."""
        has_blank = np.isin(owner, owner[self.is_blank])
        second = self.is_blank[:, None] & has_blank
        return (owner[:, None] != owner) & ~second & ~second.T

    def _grow(self) -> np.ndarray:
        """Return ranks grown in turns, the least loaded next: by the expert that shares most rows with the rank's."""
        together = self.together - np.diag(self.loads)
        owner = np.append(np.full(self.num_experts, -1), self.blanks).astype(np.int64)
        shared = np.zeros((self.num_slots, self.num_ranks))  # rows of each expert with those of each rank
        rank_loads = np.zeros(self.num_ranks)
        num_held = np.bincount(self.blanks, minlength=self.num_ranks)
        is_begun = np.zeros(self.num_ranks, dtype=bool)
        for _ in range(self.num_experts):
            rank = int(np.where(num_held < self.size, rank_loads, np.inf).argmin())
            # A rank begins with what shares least with the other ranks
            score = shared[:, rank] if is_begun[rank] else self.loads / (1 + shared.sum(axis=1))
            expert = int(np.where(owner < 0, score, -1.0).argmax())
            owner[expert] = rank
            is_begun[rank] = True
            num_held[rank] += 1
            rank_loads[rank] += self.loads[expert]
            shared[:, rank] += together[:, expert]
        return owner

    def _gains(self, owner: np.ndarray) -> np.ndarray:
        """Return [E, E]: visits saved by exchanging two experts; of no meaning where one rank owns both."""
        k = self.ids.shape[1]
        owners = owner[self.ids]
        same = owners[:, :, None] == owners[:, None, :]  # [N, K, K]
        is_first = ~(same & np.tri(k, k=-1, dtype=bool)).any(axis=2)
        is_shared = same.sum(axis=2) > 1  # the row visits the expert's rank for another one too
        visits = (self.ids[:, :, None] * self.num_ranks + owners[:, None, :]).ravel()
        weights = np.broadcast_to(is_first[:, None, :], same.shape).ravel()
        # [E, R]: rows of each expert that visit each rank, and of those its own rank for another expert too
        with_rank = np.bincount(visits, weights, minlength=self.num_slots * self.num_ranks)
        with_rank = with_rank.reshape(self.num_slots, self.num_ranks)
        at_home = np.bincount(self.ids.ravel(), is_shared.ravel(), minlength=self.num_slots)
        moved = with_rank[:, owner] - at_home[:, None]
        # Rows of both experts visit what they did; the two moves have counted them
        both = self._count_pairs(np.broadcast_to(is_shared[:, :, None], same.shape).ravel())
        return moved + moved.T - (2 * self.together - both - both.T)

    def _refine(self, owner: np.ndarray) -> np.ndarray:
        """Return the owners after exchanges, each of which saves visits and keeps to the limit."""
        owner = owner.copy()
        while True:
            is_over = self._loads_after(owner) > self.limit
            gains = np.where(self._may_exchange(owner) & ~is_over & ~is_over.T, self._gains(owner), 0)
            if gains.max() <= 0:
                return owner
            # Exchanges between other pairs of ranks change neither these gains nor these loads
            while gains.max() > 0:
                one, other = np.unravel_index(gains.argmax(), gains.shape)
                touched = (owner == owner[one]) | (owner == owner[other])
                owner[one], owner[other] = owner[other], owner[one]
                gains[touched] = gains[:, touched] = 0

    def _unload(self, owner: np.ndarray) -> np.ndarray:
        """Return the owners after exchanges that bring ranks over the limit below it, as far as that succeeds."""
        owner = owner.copy()
        while True:
            rank_loads = self._rank_loads(owner)
            busiest = int(rank_loads.argmax())
            if rank_loads[busiest] <= self.limit:
                return owner
            load = self._loads_after(owner)
            is_within = load <= self.limit
            allowed = self._may_exchange(owner) & (owner == busiest)[:, None] & (load < rank_loads[busiest])
            allowed &= is_within.T
            if not allowed.any():
                return owner
            # What mends it at once, else what lowers it most
            mends = allowed & is_within
            score = np.where(mends, self._gains(owner), -np.inf) if mends.any() else np.where(allowed, -load, -np.inf)
            one, other = np.unravel_index(score.argmax(), score.shape)
            owner[one], owner[other] = owner[other], owner[one]
