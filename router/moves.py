"""Moves of experts between ranks: the way from one placement of a layer to another, whole after every move.

Shapes: R ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LayerHolders = Sequence[tuple[int, ...]]
"""The ranks [E] that hold each expert of a layer, ascending."""

Change = tuple[int, int, int]
"""(rank, expert that it gains, expert that it drops)"""


@dataclass(frozen=True, slots=True)
class Move:
    """What some ranks hold instead of what they held, each one expert for another."""

    layer: int
    changes: tuple[Change, ...]
    """One where the dropped expert has another holder; else as many as it takes for every expert to be held."""

    def applied(self, holders: LayerHolders) -> dict[int, tuple[int, ...]]:
        """Return the holders of the experts that it changes, by expert; ``holders`` are those of its layer before."""
        changed: dict[int, set[int]] = {}
        for rank, gained, dropped in self.changes:
            changed.setdefault(gained, set(holders[gained])).add(rank)
            changed.setdefault(dropped, set(holders[dropped])).remove(rank)
        return {expert: tuple(sorted(ranks)) for expert, ranks in changed.items()}


def moves_between(layer: int, present: LayerHolders, target: LayerHolders, num_ranks: int) -> list[Move]:
    """Return moves from ``present`` to ``target``, in which every rank holds as many experts."""
    ranks = range(num_ranks)
    before = [{expert for expert, held in enumerate(present) if rank in held} for rank in ranks]
    after = [{expert for expert, held in enumerate(target) if rank in held} for rank in ranks]
    assert [len(held) for held in before] == [len(held) for held in after], "places are fixed"
    gains = [sorted(after[rank] - before[rank]) for rank in ranks]
    drops = [sorted(before[rank] - after[rank]) for rank in ranks]
    holders = list(present)
    moves: list[Move] = []

    def make(changes: Sequence[Change]) -> None:
        moves.append(Move(layer, tuple(changes)))
        for expert, held in moves[-1].applied(holders).items():
            holders[expert] = held
        for rank, gained, dropped in changes:
            gains[rank].remove(gained)
            drops[rank].remove(dropped)

    while any(gains):
        single = [(r, d) for r in ranks for d in drops[r] if len(holders[d]) > 1]
        if single:
            rank, dropped = single[0]
            make([(rank, gains[rank][0], dropped)])
        else:
            make(_cycle(gains, drops))
    return moves


def _cycle(gains: list[list[int]], drops: list[list[int]]) -> list[Change]:
    """Return changes of ranks each of which gains what the one before it drops.

    There is a cycle where nobody can drop anything alone: who drops the only copy has it from nobody, so another gains
    it, and drops something itself.
    """
    path = [next(rank for rank, dropped in enumerate(drops) if dropped)]
    while True:
        dropped = drops[path[-1]][0]
        following = next(rank for rank, gained in enumerate(gains) if dropped in gained)
        if following in path:
            ring = path[path.index(following) :]
            return [(rank, drops[ring[i - 1]][0], drops[rank][0]) for i, rank in enumerate(ring)]
        path.append(following)


def relabelled(target: LayerHolders, present: LayerHolders, num_ranks: int) -> list[tuple[int, ...]]:
    """Return ``target`` with its ranks renamed so that most of what each holds is there in ``present`` already.

    Names go only to ranks that hold as many experts. Greedy, the best match first.
    """
    wanted = [{expert for expert, held in enumerate(target) if rank in held} for rank in range(num_ranks)]
    there = [{expert for expert, held in enumerate(present) if rank in held} for rank in range(num_ranks)]
    matches = sorted(
        (-len(wanted[old] & there[new]), old, new)
        for old in range(num_ranks)
        for new in range(num_ranks)
        if len(wanted[old]) == len(there[new])
    )
    name: dict[int, int] = {}
    taken: set[int] = set()
    for _, old, new in matches:
        if old not in name and new not in taken:
            name[old] = new
            taken.add(new)
    return [tuple(sorted(name[rank] for rank in held)) for held in target]
