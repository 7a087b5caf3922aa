"""Moves of experts that take effect in one step, and the bytes that have to travel before."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from ...router.moves import Move
from ...router.placement import Placement
from ...workers.rebalance_plan import Transfer

Changes = dict[int, dict[int, tuple[int, ...]]]
"""By layer and expert: the ranks that hold it, where they are others than before."""


@dataclass(slots=True)
class _Way:
    """One expert's way from a rank to another."""

    layer: int
    expert: int
    source: int
    target: int
    num_bytes: int
    num_sent: int = 0


class MoveBatch:
    """As many of ``moves`` as ranks have room for, which are taken from them; one at least.

    ``number``: the version of the placement after them. ``bytes_per_expert``: by layer. ``budget``: most bytes that
    reach or leave a rank in a step, and that one has room for beside its experts; one expert always fits.
    """

    def __init__(
        self, number: int, placement: Placement, moves: deque[Move], bytes_per_expert: Sequence[int], budget: int
    ) -> None:
        self.number, self._placement, self._sizes, self._budget = number, placement, bytes_per_expert, budget
        self.changes: Changes = {}
        while moves:
            changes = self._with(moves[0])
            arriving: Counter[int] = Counter()
            for layer, _, rank in self._gains(changes):
                arriving[rank] += self._sizes[layer]
            if self.changes and max(arriving.values(), default=0) > budget:
                break
            self.changes = changes
            moves.popleft()
        leaving: Counter[int] = Counter()
        self._ways: list[_Way] = []
        for layer, expert, rank in self._gains(self.changes):
            source = min(placement.holders[layer][expert], key=lambda held_by: leaving[held_by])
            leaving[source] += self._sizes[layer]
            self._ways.append(_Way(layer, expert, source, rank, self._sizes[layer]))

    @property
    def num_experts(self) -> int:
        """Experts that travel."""
        return len(self._ways)

    @property
    def num_bytes(self) -> int:
        """What they come to."""
        return sum(way.num_bytes for way in self._ways)

    @property
    def is_complete(self) -> bool:
        """Whether all has been sent."""
        return all(way.num_sent == way.num_bytes for way in self._ways)

    def send(self) -> list[Transfer]:
        """Return the next step's transfers, which count as sent: a step that fails ends the batch."""
        reaching, leaving = Counter[int](), Counter[int]()
        transfers = []
        for way in self._ways:
            room = self._budget - max(reaching[way.target], leaving[way.source])
            stop = min(way.num_bytes, way.num_sent + room)
            if stop > way.num_sent:
                reaching[way.target] += stop - way.num_sent
                leaving[way.source] += stop - way.num_sent
                transfers.append(Transfer(way.layer, way.expert, way.source, way.target, way.num_sent, stop))
                way.num_sent = stop
        return transfers

    def _with(self, move: Move) -> Changes:
        """Return the changes with those of ``move`` behind them."""
        known = self.changes.get(move.layer, {})
        before = [known.get(expert, ranks) for expert, ranks in enumerate(self._placement.holders[move.layer])]
        return {**self.changes, move.layer: {**known, **move.applied(before)}}

    def _gains(self, changes: Changes) -> list[tuple[int, int, int]]:
        """Return (layer, expert, rank) of what must travel for ``changes``."""
        holders = self._placement.holders
        return [
            (layer, expert, rank)
            for layer, changed in changes.items()
            for expert, ranks in changed.items()
            for rank in ranks
            if rank not in holders[layer][expert]
        ]
