"""Which experts to move so that ranks share the work of the rows that come: few moves, from where experts are.

`balanced` begins with nothing and forgets where experts lie. Here a layer's placement is changed by one move after the
other, each taken for what it evens out per expert that has to travel, and each leaving a whole placement: whoever
carries them out may stop after any.

Shapes: R ranks, L MoE layers, E experts. ``loads`` [R, L, E]: rows of each rank that chose each expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .balanced import balanced_layer
from .moves import Change, LayerHolders, Move, moves_between, relabelled
from .placement import Placement, owner

_UNEVEN = 1.05
"""The busiest rank's load over the mean, below which a layer is left as it is: chance moves it by as much."""
_EVEN_ENOUGH = 1.02
"""What is aimed at in the others."""
_SMALLEST_GAIN = 0.002
"""What moving one expert must take off the imbalance: less is noise in the rows that were counted."""
_STUCK = 1.1
"""The imbalance above which a layer that no single move makes better is packed anew."""
_WORTH_PACKING = 0.05
"""What that must take off the imbalance: it moves many experts."""
_MOST_MOVES = 64
"""Of one layer at a time."""
_POWER = 8
"""Of the mean that stands for the maximum: unlike that, it tells which of two placements is nearer to a better one."""


def rank_loads(placement: Placement, loads: np.ndarray) -> np.ndarray:
    """Return [L, R]: pairs of row and expert that each rank computes of ``loads`` [R, L, E]."""
    found = np.zeros((placement.num_layers, placement.num_ranks))
    for layer, holders in enumerate(placement.holders):
        found[layer] = _Layer(holders, loads[:, layer]).rank_loads
    return found


def imbalance(loads: np.ndarray) -> float:
    """Return the busiest rank's load over the mean of all, each layer counting by its load; ``loads`` [.., R].

    Ranks wait for each other in every layer, so each layer has its busiest. 1 is balanced, or nothing to do.
    """
    mean = float(loads.mean(axis=-1).sum())
    return float(loads.max(axis=-1).sum()) / mean if mean > 0 else 1.0


def rebalancing_moves(placement: Placement, loads: np.ndarray) -> Iterator[Move]:
    """Yield the moves of one layer after another, in the order in which they are to be made.

    Layers that are even already have none.
    """
    for layer, holders in enumerate(placement.holders):
        yield from _layer_moves(layer, holders, loads[:, layer])


def _layer_moves(layer: int, holders: LayerHolders, loads: np.ndarray) -> Iterator[Move]:
    state = _Layer(holders, loads)
    if imbalance(state.rank_loads) <= _UNEVEN:
        return
    yield from _improve(layer, state)
    if imbalance(state.rank_loads) > _STUCK:
        copies = np.array([len(ranks) for ranks in holders])
        sizes = [sum(rank in ranks for ranks in holders) for rank in range(len(loads))]
        packed = relabelled(balanced_layer(loads.sum(axis=0), sizes, int(copies.sum())), state.holders, len(loads))
        other = _Layer(packed, loads)
        steps = list(_improve(layer, other))
        if imbalance(other.rank_loads) < imbalance(state.rank_loads) - _WORTH_PACKING:
            yield from moves_between(layer, state.holders, packed, len(loads))
            yield from steps


def _improve(layer: int, state: _Layer) -> Iterator[Move]:
    """Make moves in ``state`` while they are worth it, and yield them."""
    for _ in range(_MOST_MOVES):
        found = state.best_change() if imbalance(state.rank_loads) > _EVEN_ENOUGH else None
        if found is None:
            return
        move = Move(layer, found)
        state.apply(move)
        yield move


class _Layer:
    """One layer on its way to balance: who holds what, and what that makes of ``loads`` [R, E]."""

    def __init__(self, holders: LayerHolders, loads: np.ndarray) -> None:
        self.holders, self.loads, self.num_ranks = list(holders), loads, len(loads)
        self._rows: dict[tuple[int, tuple[int, ...]], np.ndarray] = {}
        single = [expert for expert, ranks in enumerate(holders) if len(ranks) == 1]
        owners = [holders[expert][0] for expert in single]
        self.rank_loads: np.ndarray = np.bincount(  # [R]
            owners, weights=loads.sum(axis=0)[single], minlength=self.num_ranks
        )
        for expert, ranks in enumerate(holders):
            if len(ranks) > 1:
                self.rank_loads = self.rank_loads + self._rows_on(expert, ranks)
        self.mean = max(float(self.rank_loads.mean()), 1e-9)

    def apply(self, move: Move) -> None:
        """Make a move."""
        for expert, ranks in move.applied(self.holders).items():
            self.rank_loads = self.rank_loads + self._change(expert, ranks)
            self.holders[expert] = ranks

    def best_change(self) -> tuple[Change, ...] | None:
        """Return the changes of the move that evens out most per expert moved; None when none is worth it."""
        busiest = int(self.rank_loads.argmax())
        held = [
            {expert for expert, ranks in enumerate(self.holders) if rank in ranks} for rank in range(self.num_ranks)
        ]
        now = float(self._unevenness(self.rank_loads))
        best, best_gain = None, _SMALLEST_GAIN
        for changes, gain in (*self._replacements(busiest, held, now), *self._exchanges(busiest, held, now)):
            if gain > best_gain:
                best, best_gain = changes, gain
        return best

    def _replacements(
        self, busiest: int, held: list[set[int]], now: float
    ) -> Iterator[tuple[tuple[Change, ...], float]]:
        """Yield the best replacement of a copy on each rank: a copy of what the busiest holds, or there, of another."""
        for rank in range(self.num_ranks):
            spare = [expert for expert in sorted(held[rank]) if len(self.holders[expert]) > 1]
            wanted = range(len(self.holders)) if rank == busiest else held[busiest]
            gained = [expert for expert in sorted(wanted) if expert not in held[rank]]
            if not spare or not gained:
                continue
            less = np.stack([self._change(expert, self._without(expert, rank)) for expert in spare])
            more = np.stack([self._change(expert, self._with(expert, rank)) for expert in gained])
            score = self._unevenness(self.rank_loads + less[:, None] + more)
            one, other = np.unravel_index(score.argmin(), score.shape)
            yield ((rank, gained[other], spare[one]),), now - float(score[one, other])

    def _exchanges(self, busiest: int, held: list[set[int]], now: float) -> Iterator[tuple[tuple[Change, ...], float]]:
        """Yield the best exchange of the busiest rank with each other one."""
        for rank in range(self.num_ranks):
            here, there = sorted(held[busiest] - held[rank]), sorted(held[rank] - held[busiest])
            if rank == busiest or not here or not there:
                continue
            away = np.stack([self._change(expert, self._with(expert, rank, without=busiest)) for expert in here])
            back = np.stack([self._change(expert, self._with(expert, busiest, without=rank)) for expert in there])
            score = self._unevenness(self.rank_loads + away[:, None] + back)
            one, other = np.unravel_index(score.argmin(), score.shape)
            changes = ((rank, here[one], there[other]), (busiest, there[other], here[one]))
            yield changes, (now - float(score[one, other])) / 2

    def _unevenness(self, by_rank: np.ndarray) -> np.ndarray:
        """Return a smooth stand-in for the imbalance of loads [.., R]."""
        found: np.ndarray = np.mean((by_rank / self.mean) ** _POWER, axis=-1) ** (1 / _POWER)
        return found

    def _with(self, expert: int, rank: int, *, without: int = -1) -> tuple[int, ...]:
        return tuple(sorted({*self.holders[expert], rank} - {without}))

    def _without(self, expert: int, rank: int) -> tuple[int, ...]:
        return tuple(r for r in self.holders[expert] if r != rank)

    def _change(self, expert: int, ranks: tuple[int, ...]) -> np.ndarray:
        """Return [R]: what the ranks' loads change by if ``ranks`` hold an expert."""
        return self._rows_on(expert, ranks) - self._rows_on(expert, self.holders[expert])

    def _rows_on(self, expert: int, ranks: tuple[int, ...]) -> np.ndarray:
        """Return [R]: the rows of an expert that each rank computes if ``ranks`` hold it."""
        key = expert, ranks
        if key not in self._rows:
            owners = [owner(ranks, expert, rank, self.num_ranks) for rank in range(self.num_ranks)]
            self._rows[key] = np.bincount(owners, weights=self.loads[:, expert], minlength=self.num_ranks)
        return self._rows[key]
