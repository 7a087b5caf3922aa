"""How many distinct experts a number of rows needs: the reason that verification is not free in an MoE."""

from __future__ import annotations

import math
from itertools import accumulate

from .budget_level import BudgetLevel

_MAX_OCTAVE = 16
_MEMORY = 64.0
"""Observations a knot remembers."""
_REFRESH_STEPS = 8
"""Observations between two readings of the curve: it moves too slowly to be read in each step."""
_PRIOR_WEIGHT = 0.5
"""Observations that the expectation of a budget's knot counts for."""
_FADE_STEPS = 1000.0
"""Steps after which what a budget's knot was told counts for a third, if nothing renewed it."""


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
        self._curve: list[float] = []
        self.num_learned = 0

    def learn(self, num_rows: int, experts: float, weight: float = 1.0) -> None:
        """Take one step's count, a mean over layers, of the rank that computed most; ``weight``: what it counts for."""
        ratio = experts / self._prior(num_rows)
        place = min(math.log2(num_rows), _MAX_OCTAVE - 1)
        low, above = int(place), place % 1
        for knot, share in ((low, 1 - above), (low + 1, above)):
            if share:
                kept = min(self._weights[knot], _MEMORY)
                self._weights[knot] = kept + weight * share
                self._ratios[knot] += (ratio - self._ratios[knot]) * weight * share / (kept + weight * share)
        self.num_learned += 1
        if self.num_learned <= _REFRESH_STEPS or self.num_learned % _REFRESH_STEPS == 0:
            self._curve = []

    def experts(self, num_rows: int) -> float:
        """Return the expected count for ``num_rows`` >= 1 rows."""
        if num_rows >= len(self._curve):
            self._curve = self._read(2 * num_rows)
        return self._curve[num_rows]

    def ratio(self, knot: int) -> float:
        """Return the ratio to uniform routing at 2^``knot`` rows; one never seen takes that of those below it."""
        while knot and not self._weights[knot]:
            knot -= 1
        return self._ratios[knot]

    def _read(self, num_rows: int) -> list[float]:
        curve, slope = [0.0], math.inf
        for rows in range(1, num_rows + 1):
            slope = min(slope, max(0.0, self._raw(rows) - curve[-1]))
            curve.append(curve[-1] + slope)
        return curve

    def _raw(self, num_rows: int) -> float:
        place = min(math.log2(num_rows), _MAX_OCTAVE - 1)
        low, above = int(place), place % 1
        return self._prior(num_rows) * ((1 - above) * self.ratio(low) + above * self.ratio(low + 1))

    def _prior(self, num_rows: int) -> float:
        return self._local * (1 - self._missed**num_rows)


class BudgetedCurve(ExpertsCurve):
    """The same under a budget that all rows keep to. Prior: ``exact`` less what the budget saved when calibrated.

    What was learned fades back to that, since requests come and go and a size that did not pay is not tried again.
    """

    def __init__(
        self, num_experts: int, num_experts_per_tok: int, num_ranks: int, exact: ExpertsCurve, level: BudgetLevel
    ) -> None:
        super().__init__(num_experts, num_experts_per_tok, num_ranks)
        self._exact, self._level = exact, level
        self._last = [0] * (_MAX_OCTAVE + 1)
        """When each knot was told something."""
        self._read_at = 0

    def learn(self, num_rows: int, experts: float, weight: float = 1.0) -> None:
        """Take one step's count under the budget."""
        super().learn(num_rows, experts, weight)
        low = int(min(math.log2(num_rows), _MAX_OCTAVE - 1))
        self._last[low] = self._last[low + 1] = self._now

    def experts(self, num_rows: int) -> float:
        """Return the expected count for ``num_rows`` >= 1 rows, at most that without a budget."""
        if self._now - self._read_at >= _REFRESH_STEPS:
            self._curve, self._read_at = [], self._now
        return min(super().experts(num_rows), self._exact.experts(num_rows))

    def _read(self, num_rows: int) -> list[float]:
        """Rising, but not flattening: sizes that were tried may stand above others that were not."""
        return [0.0, *accumulate((self._raw(rows) for rows in range(1, num_rows + 1)), max)]

    def ratio(self, knot: int) -> float:
        """Return what was learned of this very knot, as far as it is not forgotten, else what is expected."""
        expected = self._exact.ratio(knot) * self._level.experts_kept(1 << knot)
        weight = self._weights[knot] * math.exp((self._last[knot] - self._now) / _FADE_STEPS)
        return (weight * self._ratios[knot] + _PRIOR_WEIGHT * expected) / (weight + _PRIOR_WEIGHT)

    @property
    def _now(self) -> int:
        return self.num_learned + self._exact.num_learned
