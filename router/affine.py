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
_MAX_ROWS = 8192
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
    for layer, layer_sizes_ in enumerate(sizes):
        owner = _Layer(rows[:, layer], num_experts, np.array(layer_sizes_), max_load_imbalance).place()
        holders.append(tuple((rank,) for rank in owner.tolist()))
    return Placement(num_experts, num_ranks, tuple(holders))


class _Layer:
    """One layer's rows [N, K], and the search for the owner [E] of each expert."""

    def __init__(self, ids: np.ndarray, num_experts: int, sizes: np.ndarray, max_load_imbalance: float) -> None:
        self.ids, self.num_experts, self.sizes, self.num_ranks = ids, num_experts, sizes, len(sizes)
        self.loads = np.bincount(ids.ravel(), minlength=num_experts)
        # Every two experts of a row, itself included
        self.pairs = (ids[:, :, None] * num_experts + ids[:, None, :]).ravel()
        self.together = np.bincount(self.pairs, minlength=num_experts**2).reshape(num_experts, num_experts)
        self.even = np.array(pack(self.loads, np.ones_like(self.loads), sizes.tolist()))[:, 0]
        mean = self.loads.sum() / self.num_ranks
        self.limit = max(max_load_imbalance * mean, self._rank_loads(self.even).max())

    def place(self) -> np.ndarray:
        """Return the better of two searches: from ranks grown of what belongs together, and from balanced ones."""
        found = []
        for start in (self._grow(), self.even):
            owner = self._refine(self._unload(start))
            if self._rank_loads(owner).max() <= self.limit:
                found.append((self._num_visits(owner), len(found), owner))
        return min(found)[2]

    def _rank_loads(self, owner: np.ndarray) -> np.ndarray:
        return np.bincount(owner, weights=self.loads, minlength=self.num_ranks)

    def _num_visits(self, owner: np.ndarray) -> int:
        visited = np.sort(owner[self.ids], axis=1)
        return len(visited) + int((visited[:, 1:] != visited[:, :-1]).sum())

    def _grow(self) -> np.ndarray:
        """Return ranks grown in turns, the least loaded next: by the expert that shares most rows with the rank's."""
        together = self.together - np.diag(self.loads)
        owner = np.full(self.num_experts, -1)
        shared = np.zeros((self.num_experts, self.num_ranks))  # rows of each expert with those of each rank
        room, rank_loads = self.sizes.copy(), np.zeros(self.num_ranks)
        for _ in range(self.num_experts):
            rank = int(np.where(room > 0, rank_loads, np.inf).argmin())
            if room[rank] == self.sizes[rank]:  # the first: the least shared with what other ranks have
                score = self.loads / (1 + shared.sum(axis=1))
            else:
                score = shared[:, rank]
            expert = int(np.where(owner < 0, score, -1.0).argmax())
            owner[expert] = rank
            room[rank] -= 1
            rank_loads[rank] += self.loads[expert]
            shared[:, rank] += together[:, expert]
        return owner

    def _gains(self, owner: np.ndarray) -> np.ndarray:
        """Return [E, E]: visits saved by exchanging two experts; of no meaning where one rank owns both."""
        num_rows, k = self.ids.shape
        owners = owner[self.ids]
        same = owners[:, :, None] == owners[:, None, :]  # [N, K, K]
        is_first = ~(same & np.tri(k, k=-1, dtype=bool)).any(axis=2)
        is_shared = same.sum(axis=2) > 1  # the row visits the expert's rank for another one too
        # with[e, r]: rows of e that visit rank r for another expert
        visits = (self.ids[:, :, None] * self.num_ranks + owners[:, None, :]).ravel()
        weights = np.broadcast_to(is_first[:, None, :], same.shape).ravel()
        with_rank = np.bincount(visits, weights, minlength=self.num_experts * self.num_ranks)
        with_rank = with_rank.reshape(self.num_experts, self.num_ranks)
        at_home = np.bincount(self.ids.ravel(), is_shared.ravel(), minlength=self.num_experts)
        moved = with_rank[:, owner] - at_home[:, None]
        # Rows with both lose nothing and gain nothing, but the sum counts them
        shared_pairs = np.broadcast_to(is_shared[:, :, None], same.shape).ravel()
        both = np.bincount(self.pairs, shared_pairs, minlength=self.num_experts**2).reshape(self.together.shape)
        return moved + moved.T - (2 * self.together - both - both.T)

    def _refine(self, owner: np.ndarray) -> np.ndarray:
        """Return the owners after exchanges, each of which saves visits and keeps to the limit."""
        owner = owner.copy()
        while True:
            gains = self._gains(owner)
            load = self._rank_loads(owner)[owner][:, None] - self.loads[:, None] + self.loads
            gains[(load > self.limit) | (load.T > self.limit) | (owner[:, None] == owner)] = 0
            if gains.max() <= 0:
                return owner
            # Exchanges between other pairs of ranks neither change these gains nor these loads
            while True:
                one, other = np.unravel_index(gains.argmax(), gains.shape)
                if gains[one, other] <= 0:
                    break
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
            gains = self._gains(owner)
            load = rank_loads[owner][:, None] - self.loads[:, None] + self.loads  # [E, E] of the first one's rank
            allowed = (owner == busiest)[:, None] & (owner != busiest) & (load < rank_loads[busiest])
            allowed &= load.T <= self.limit
            if not allowed.any():
                return owner
            # What mends it at once, else what lowers it most
            mends = allowed & (load <= self.limit)
            score = np.where(mends, gains, -np.inf) if mends.any() else np.where(allowed, -load, -np.inf)
            one, other = np.unravel_index(score.argmax(), score.shape)
            owner[one], owner[other] = owner[other], owner[one]
