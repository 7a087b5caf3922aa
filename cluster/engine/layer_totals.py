"""Running totals of what ranks count in every layer: by rank, and by layer."""

from __future__ import annotations

from collections.abc import Mapping
from operator import add

from ...workers.plan import LayerCounts, StepResult

COUNTS = ("rows", "experts", "rows_sent", "payload_bytes", "wire_bytes", "budgeted_rows", "weight_kept")
"""The fields of `LayerCounts`."""


class LayerTotals:
    """Sums over committed steps. A series per rank and per layer, not per pair: their number must stay small.

    Taking a step costs a sum and an addition of lists for every rank and count: 9 us with two ranks of four layers, 0.4
    ms with 32 of 48.
    """

    def __init__(self, num_ranks: int, num_layers: int) -> None:
        self._by_rank: dict[str, list[float]] = {name: [0] * num_ranks for name in COUNTS}
        self._by_layer: dict[str, list[float]] = {name: [0] * num_layers for name in COUNTS}

    def add(self, result: StepResult) -> Mapping[str, float]:
        """Take one committed step; return its own sums over ranks and layers."""
        return {
            name: sum(self._add(name, rank, found.counts) for rank, found in enumerate(result.ranks)) for name in COUNTS
        }

    def _add(self, name: str, rank: int, counts: LayerCounts) -> float:
        values = getattr(counts, name)
        if not values:  # no budget
            return 0
        total: float = sum(values)
        if total:
            self._by_rank[name][rank] += total
            self._by_layer[name] = list(map(add, self._by_layer[name], values))
        return total

    def by_rank(self) -> dict[str, list[float]]:
        """Return each count's totals by rank, over all layers."""
        return {name: list(values) for name, values in self._by_rank.items()}

    def by_layer(self) -> dict[str, list[float]]:
        """Return each count's totals by MoE layer, over all ranks."""
        return {name: list(values) for name, values in self._by_layer.items()}
