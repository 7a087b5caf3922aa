"""What a step costs: its time fitted online to what ranks count."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .allocation import StepPrice
from .budget_level import BudgetLevel
from .experts_curve import BudgetedCurve, ExpertsCurve

Level = int | None
"""Index of the budget that acts in a step, None for none."""

PRIOR_SHARES = (0.6, 0.2, 0.2)
"""Of a plain step's time: what is fixed, what grows with rows and with experts, until larger steps were measured."""
_PRIOR_WEIGHT = 0.5
"""Steps that the prior counts for, at twice and at four times the rows measured most."""
_MEMORY = 64.0
"""Steps that a number of rows remembers."""
_FADE_STEPS = 1000.0
"""Steps after which an observation that was not renewed counts for a third."""
_CLIP_SPREADS = 3.0
_CLIP_FACTOR = 2.5
_SHIFT_STEPS = 4
"""Outliers in a row, on one side, that are taken for the truth."""
ENOUGH = 4
"""Measured steps of a size after which its cost counts as known."""
_NEAR = 0.5
"""Share of its rows by which a size may differ from one whose measured steps speak for it."""
_SLOPE_ERROR = 0.2
"""Relative error of a time by the relative difference in rows over which the fit extends it."""
_MIN_MISFIT = 0.01
"""Least relative error of the fitted form that is reckoned with."""
_TRUSTED_WEIGHT = 8.0
"""Steps measured before expectations clip outliers."""
_REFIT_STEPS = (4, 16)
"""Steps between two fits: the first 64, and all later ones."""
_RIDGE = 1e-4
_LEAST_SHARE = 0.1
"""Of the fitted time, that is left whatever the residual says."""
_LEAST_S = 1e-9
_PAIR_STEPS = 2.0
"""Steps without a budget that make a size one measured both ways."""
_PAIR_SHARE = 0.9
"""Experts, or rows sent, that a budget must have left at most there."""
_MIN_SHARE = 0.25
"""Least share of a step's rows that must keep to a budget for the step to tell what the budget does."""


class _Bin:
    """Mean step of one number of rows: its features and time, outliers clipped."""

    __slots__ = ("features", "last_step", "num_clipped", "residual", "spread", "time_s", "weight")

    def __init__(self, features: np.ndarray, time_s: float) -> None:
        self.features, self.time_s, self.spread = features, time_s, 0.2 * time_s
        self.weight, self.last_step, self.residual = 1.0, 0, 0.0
        self.num_clipped = 0
        """Latest steps in a row that were clipped, negative if they were too fast."""

    def add(self, features: np.ndarray, time_s: float) -> None:
        error = time_s - self.time_s
        limit = _CLIP_SPREADS * self.spread
        if abs(error) <= limit:
            self.num_clipped = 0
        else:
            self.num_clipped = max(self.num_clipped, 0) + 1 if error > 0 else min(self.num_clipped, 0) - 1
        if abs(self.num_clipped) >= _SHIFT_STEPS:  # no outliers: the machine has changed
            self.weight, self.num_clipped, limit = 0.0, 0, abs(error)
        share = 1 / (self.weight + 1)
        self.weight = min(self.weight + 1, _MEMORY)
        self.features = self.features + share * (features - self.features)
        self.time_s += share * min(max(error, -limit), limit)
        self.spread += min(share, 0.5) * (min(abs(error), limit) - self.spread)


class StepCost:
    """t = a + b rows + c experts + d rows sent + e where a budget of experts acts, in lock-step over all ranks.

    Every layer ends when its slowest rank does, phase by phase (attention, dispatch, experts, combine), so each
    feature is that of the rank with most of it. Steps are averaged per total number of rows and level of budget,
    robustly, and the coefficients are fitted to those means: what was measured at other sizes is not forgotten while
    one size rules. Coefficients are never negative: e is what choosing within a budget costs. What the fit leaves at a
    size seen often (a CUDA graph's padding) is added back.

    A ``level`` is an index of ``levels``, None for no budget. Of the rows of a step under one, ``num_budgeted`` keep to
    it; experts and rows sent are taken to lie so far between those without a budget and those where all rows do, and
    experts at least at those that the other rows read.
    """

    def __init__(
        self, num_experts: int, num_experts_per_tok: int, num_ranks: int, levels: Sequence[BudgetLevel] = ()
    ) -> None:
        self._experts = ExpertsCurve(num_experts, num_experts_per_tok, num_ranks)
        self._curves = [
            BudgetedCurve(num_experts, num_experts_per_tok, num_ranks, self._experts, level) for level in levels
        ]
        self._bins: dict[tuple[int, Level], _Bin] = {}
        self._coefficients = [0.0] * 5
        self._witnesses: dict[tuple[int, Level], tuple[_Bin | None, float]] = {}
        """What `_nearest` has found since the last step."""
        self._misfit = 1.0
        """Relative error of the fitted form at a size that it was not fitted to."""
        self._sent_per_row = 0.0
        self._sent_kept = [level.ranks_kept for level in levels]
        """Per level: the share of rows sent that is left where all rows keep to it."""
        self._sent_weights = [0.0] * len(levels)
        self._num_exact = 0
        """Steps without a budget."""
        self._num_steps = 0

    @property
    def is_known(self) -> bool:
        """Whether any step has been measured."""
        return bool(self._bins)

    @property
    def budgets_matter(self) -> bool:
        """Whether a step takes longer for the experts that it reads, or for the rows that it sends."""
        return self._coefficients[2] > 0 or self._coefficients[3] > 0

    def least_s(self, num_rows: int, max_rows: int, level: Level = None, num_budgeted: int = 0) -> float:
        """Return the lower of what is expected of a step and of the mean of those of about its size."""
        found = self._bins.get((_bin_of(num_rows), level))
        expected = self.step_s(num_rows, max_rows, level, num_budgeted)
        return min(found.time_s, expected) if found else expected

    def steps_since(self, num_rows: int, level: Level = None) -> float:
        """Return how many steps ago what `relative_error` rests on was measured; infinity if nothing was."""
        found, _ = self._witness(num_rows, level)
        return self._num_steps - found.last_step if found else math.inf

    def relative_error(self, num_rows: int, level: Level = None) -> float:
        """Return the standard error of the expected time of steps of about this size, relative to it; 1 if unknown.

        Of a size that was not measured enough, that of the nearest one that was, if one is near, and what the fit
        misses between sizes.
        """
        found, distance = self._witness(num_rows, level)
        if found is None:
            return 1.0
        error = found.spread / found.time_s / math.sqrt(found.weight)
        return math.hypot(error, self._misfit, _SLOPE_ERROR * distance) if distance else error

    def is_measured(self, num_rows: int, level: Level = None) -> bool:
        """Whether enough steps of about this size were, or of one that is near."""
        found, _ = self._witness(num_rows, level)
        return found is not None and found.weight >= ENOUGH

    def _witness(self, num_rows: int, level: Level) -> tuple[_Bin | None, float]:
        """Return what says most of steps of a size, and how far from it that is, relative to it."""
        number = _bin_of(num_rows)
        own = self._bins.get((number, level))
        if own is not None and own.weight >= ENOUGH:
            return own, 0.0
        known = self._witnesses.get((number, level))
        if known is None:
            known = self._witnesses[number, level] = self._nearest(number, level, own)
        return known

    def _nearest(self, number: int, level: Level, own: _Bin | None) -> tuple[_Bin | None, float]:
        near = [
            (abs(other - number), found)
            for (other, under), found in self._bins.items()
            if under == level and found.weight >= ENOUGH and abs(other - number) <= _NEAR * number
        ]
        if not near:
            return own, 0.0
        distance, found = min(near, key=lambda pair: pair[0])
        return found, distance / number

    def num_seen(self, num_rows: int, level: Level = None) -> float:
        """Return how often steps of about this size were measured lately."""
        found = self._bins.get((_bin_of(num_rows), level))
        return found.weight if found else 0.0

    @property
    def is_paired(self) -> bool:
        """Whether a size was lately measured both without a budget and under one that saved experts or rows sent."""
        for (number, level), found in self._bins.items():
            exact = self._bins.get((number, None))
            if level is None or exact is None or exact.weight < _PAIR_STEPS:
                continue
            saves = (found.features[2:4] < _PAIR_SHARE * exact.features[2:4]).any()
            if saves and self._num_steps - exact.last_step <= _FADE_STEPS:
                return True
        return False

    @property
    def num_measured(self) -> float:
        """How many steps the fit rests on."""
        return sum(found.weight for found in self._bins.values())

    def learn_experts(self, num_rows: int, experts: float, level: Level = None, num_budgeted: int = 0) -> None:
        """Take one step's count of experts, whatever its rows were for."""
        if level is None:
            self._experts.learn(num_rows, experts)
            return
        share = num_budgeted / num_rows
        if share >= _MIN_SHARE:
            exact = self._experts.experts(num_rows)
            # As many as if all rows had kept to it
            self._curves[level].learn(num_rows, max(exact - (exact - experts) / share, 0.0), share)

    def learn(
        self,
        num_rows: int,
        max_rows: int,
        experts: float,
        rows_sent: float,
        step_s: float,
        level: Level = None,
        num_budgeted: int = 0,
    ) -> None:
        """Take one step without prompt rows.

        ``num_rows``: of all ranks, ``num_budgeted`` of which kept to ``level``; the other counts are of the rank with
        most of them, means over MoE layers.
        """
        self._num_steps += 1
        self._witnesses.clear()
        self._learn_sent(rows_sent / max_rows, level, num_budgeted / num_rows)
        if self.num_measured >= _TRUSTED_WEIGHT:
            expected = self.step_s(num_rows, max_rows, level, num_budgeted)
            step_s = min(max(step_s, expected / _CLIP_FACTOR), expected * _CLIP_FACTOR)
        features = np.array([1.0, max_rows, experts, rows_sent, float(level is not None)])
        key = _bin_of(num_rows), level
        is_new = key not in self._bins
        if is_new:
            self._bins[key] = _Bin(features, step_s)
        else:
            self._bins[key].add(features, step_s)
        self._bins[key].last_step = self._num_steps
        if is_new or self._num_steps % _REFIT_STEPS[self._num_steps > 64] == 0:
            self._fit()

    def step_s(self, num_rows: int, max_rows: int, level: Level = None, num_budgeted: int = 0) -> float:
        """Return the expected time of a step; ``num_rows``: of all ranks, ``max_rows``: of the rank with most."""
        return self.price(level)(num_rows, max_rows, num_budgeted)

    def price(self, level: Level = None) -> StepPrice:
        """Return `step_s` under ``level``, for many sizes."""
        fixed, per_row, per_expert, per_sent, per_choice = self._coefficients
        exact = per_row + per_sent * self._sent_per_row
        bins, experts = self._bins, self._experts.experts

        def exact_s(num_rows: int, max_rows: int, _: int) -> float:
            found = bins.get((_bin_of(num_rows), None))
            return _time_s(fixed + exact * max_rows + per_expert * experts(num_rows), found)

        if level is None:
            return exact_s
        curve = self._curves[level].experts
        sent_saved = per_sent * self._sent_per_row * (1 - self._sent_kept[level])

        def budgeted_s(num_rows: int, max_rows: int, num_budgeted: int) -> float:
            if not num_budgeted:
                return exact_s(num_rows, max_rows, 0)
            share, number = num_budgeted / num_rows, _bin_of(num_rows)
            found = bins.get((number, level)) or bins.get((number, None))
            read = experts(num_rows)
            others = experts(num_rows - num_budgeted) if num_budgeted < num_rows else 0.0
            read = max(read - share * (read - curve(num_rows)), others)
            time_s = fixed + per_choice + (exact - share * sent_saved) * max_rows + per_expert * read
            return _time_s(time_s, found)

        return budgeted_s

    def _learn_sent(self, sent_per_row: float, level: Level, share: float) -> None:
        if level is None:
            self._num_exact += 1
            self._sent_per_row += (sent_per_row - self._sent_per_row) / min(self._num_exact, _MEMORY)
        elif self._sent_per_row and share >= _MIN_SHARE:
            kept = min(max(1 - (1 - sent_per_row / self._sent_per_row) / share, 0.0), 1.0)
            weight = self._sent_weights[level] = min(self._sent_weights[level] + share, _MEMORY)
            self._sent_kept[level] += (kept - self._sent_kept[level]) * share / weight

    def _fit(self) -> None:
        bins = list(self._bins.values())
        weights = [found.weight * np.exp((found.last_step - self._num_steps) / _FADE_STEPS) for found in bins]
        features, times = [found.features for found in bins], [found.time_s for found in bins]
        # The prior is of steps without a budget, as soon as there is one
        exact = [index for index, (_, level) in enumerate(self._bins) if level is None] or range(len(bins))
        most = max(exact, key=lambda index: weights[index])
        for factor in (2, 4):
            prior_features, prior_time = self._prior(features[most], times[most], factor)
            features.append(prior_features)
            times.append(prior_time)
            weights.append(_PRIOR_WEIGHT)
        self._coefficients = _fit_nonnegative(np.array(features), np.array(times), np.array(weights)).tolist()
        self._fit_residuals(bins)

    def _fit_residuals(self, bins: Sequence[_Bin]) -> None:
        """Add back to every size what the form misses there, as far as noise does not explain it (empirical Bayes)."""
        misfits = [1 - float(found.features @ self._coefficients) / found.time_s for found in bins]
        noises = [(found.spread / found.time_s) ** 2 for found in bins]
        total = sum(found.weight for found in bins)
        excess = [m * m * b.weight - noise for m, noise, b in zip(misfits, noises, bins, strict=True)]
        misfit_variance = max(sum(excess) / total, _MIN_MISFIT**2)
        self._misfit = math.sqrt(misfit_variance)
        for found, misfit, noise in zip(bins, misfits, noises, strict=True):
            found.residual = misfit * found.time_s * found.weight / (found.weight + noise / misfit_variance)

    def _prior(self, features: np.ndarray, time_s: float, factor: int) -> tuple[np.ndarray, float]:
        """Return what a step of ``factor`` times the rows is taken to count and cost before one was seen."""
        _, rows, experts, sent, chosen = features
        num_rows = max(1, round(rows))
        growth = self._experts.experts(factor * num_rows) / self._experts.experts(num_rows)
        prior_time = time_s * sum(share * by for share, by in zip(PRIOR_SHARES, (1, factor, growth), strict=True))
        return np.array([1.0, factor * rows, growth * experts, factor * sent, chosen]), prior_time


def _time_s(fitted_s: float, found: _Bin | None) -> float:
    """Return a time above 0: what a size's residual takes off was measured with other counts than those asked for."""
    residual = found.residual if found else 0.0
    return max(fitted_s + residual, _LEAST_SHARE * fitted_s, _LEAST_S)


def _bin_of(num_rows: int) -> int:
    """Return the largest size that is one with ``num_rows``: itself up to 32, then a sixteenth of an octave.

    Powers of two, up to which graphs are padded, end a bin.
    """
    step = 1 << max(0, (num_rows - 1).bit_length() - 5)
    return -(-num_rows // step) * step


def _fit_nonnegative(features: np.ndarray, times: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return coefficients >= 0 of the weighted least relative squares, by dropping negative ones until none is."""
    scale = np.maximum(features.max(axis=0), 1e-12)
    rows = features / scale * (np.sqrt(weights) / times)[:, None]
    goal = np.sqrt(weights)
    active = [column for column in range(features.shape[1]) if features[:, column].any()]
    coefficients = np.zeros(features.shape[1])
    while active:
        part = rows[:, active]
        gram = part.T @ part
        solved = np.linalg.solve(gram + _RIDGE * np.trace(gram) * np.eye(len(active)), part.T @ goal)
        if solved.min() >= 0:
            coefficients[active] = solved
            break
        active.pop(int(solved.argmin()))
    return coefficients / scale
