"""Counts of observations by size, as Prometheus histograms have them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    """A histogram at one moment."""

    bounds: tuple[float, ...]
    """Upper bounds of the buckets but the last, ascending; a bound is inside its bucket."""
    counts: tuple[int, ...]
    """Observations in each bucket; one more than there are bounds."""
    total: float
    """Sum of all observations."""


class Histogram:
    """Observations in buckets that end at ``bounds``, and one more for what is larger."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def snapshot(self) -> HistogramSnapshot:
        """Return the counts as they are now."""
        return HistogramSnapshot(self._bounds, tuple(self._counts), self._total)
