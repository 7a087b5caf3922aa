"""How many distinct experts a number of rows needs: the reason that verification is not free in an MoE."""

from __future__ import annotations

import math

_MAX_OCTAVE = 16
_MEMORY = 64.0
"""Observations a knot remembers."""
_REFRESH_STEPS = 8
"""Observations between two readings of the curve: it moves too slowly to be read in each step."""


class ExpertsCurve:
    """Distinct experts per MoE layer on the busiest rank, as a function of the rows of all ranks.

    Prior: uniform routing, L (1 - (1 - K/E)^T) for T rows and L local experts, which real routing stays below because
    neighbouring tokens choose alike. Learned: the ratio to the prior at octaves of rows, linear in between. Reading it
    enforces what must hold: more rows never need fewer experts, and each further row no more than the one before.
    """

    def __init__(self, num_experts: int, num_experts_per_tok: int, num_ranks: int) -> None:
        self._local = num_experts / num_ranks
        self._missed = 1 - num_experts_per_tok / num_experts
        """Probability that one row leaves a given expert alone."""
        self._ratios = [1.0] * (_MAX_OCTAVE + 1)
        self._weights = [0.0] * (_MAX_OCTAVE + 1)
        self._num_learned = 0
        self._curve: list[float] = []

    def learn(self, num_rows: int, experts: float) -> None:
        """Take one step's count, a mean over layers, of the rank that computed most."""
        ratio = experts / self._prior(num_rows)
        place = min(math.log2(num_rows), _MAX_OCTAVE - 1)
        low, above = int(place), place % 1
        for knot, share in ((low, 1 - above), (low + 1, above)):
            if share:
                kept = min(self._weights[knot], _MEMORY)
                self._weights[knot] = kept + share
                self._ratios[knot] += (ratio - self._ratios[knot]) * share / (kept + share)
        self._num_learned += 1
        if self._num_learned <= _REFRESH_STEPS or self._num_learned % _REFRESH_STEPS == 0:
            self._curve = []

    def experts(self, num_rows: int) -> float:
        """Return the expected count for ``num_rows`` >= 1 rows."""
        if num_rows >= len(self._curve):
            self._curve = self._read(2 * num_rows)
        return self._curve[num_rows]

    def _read(self, num_rows: int) -> list[float]:
        curve, slope = [0.0], math.inf
        for rows in range(1, num_rows + 1):
            slope = min(slope, max(0.0, self._raw(rows) - curve[-1]))
            curve.append(curve[-1] + slope)
        return curve

    def _raw(self, num_rows: int) -> float:
        place = min(math.log2(num_rows), _MAX_OCTAVE - 1)
        low, above = int(place), place % 1
        return self._prior(num_rows) * ((1 - above) * self._ratio(low) + above * self._ratio(low + 1))

    def _ratio(self, knot: int) -> float:
        """Return a knot's ratio; one never seen takes that of the nearest seen below it, or the prior's."""
        while knot and not self._weights[knot]:
            knot -= 1
        return self._ratios[knot]

    def _prior(self, num_rows: int) -> float:
        return self._local * (1 - self._missed**num_rows)
