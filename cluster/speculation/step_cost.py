"""What a step costs: its time fitted online to what ranks count."""

from __future__ import annotations

import numpy as np

from .experts_curve import ExpertsCurve

PRIOR_FIXED_SHARE = 0.6
"""Share of a plain step's time that more experts do not lengthen, until larger steps have been measured."""
_PRIOR_WEIGHT = 0.5
"""Steps that the prior counts for, at twice and at four times the rows measured most."""
_MEMORY = 32.0
"""Steps that a number of rows remembers."""
_FADE_STEPS = 1000.0
"""Steps after which an observation that was not renewed counts for a third."""
_CLIP_SPREADS = 3.0
_CLIP_FACTOR = 2.5
_RESIDUAL_SHRINKAGE = 8.0
_REFIT_STEPS = 4
_RIDGE = 1e-4


class _Bin:
    """Mean step of one number of rows: its features and time, outliers clipped."""

    __slots__ = ("features", "last_step", "residual", "spread", "time_s", "weight")

    def __init__(self, features: np.ndarray, time_s: float) -> None:
        self.features, self.time_s, self.spread = features, time_s, 0.2 * time_s
        self.weight, self.last_step, self.residual = 1.0, 0, 0.0

    def add(self, features: np.ndarray, time_s: float) -> None:
        share = 1 / (self.weight + 1)
        self.weight = min(self.weight + 1, _MEMORY)
        self.features = self.features + share * (features - self.features)
        error = time_s - self.time_s
        limit = _CLIP_SPREADS * self.spread
        self.time_s += share * min(max(error, -limit), limit)
        self.spread += share * (min(abs(error), limit) - self.spread)


class StepCost:
    """t = a + b rows + c experts + d rows sent, in lock-step over all ranks.

    Every layer ends when its slowest rank does, phase by phase (attention, dispatch, experts, combine), so each
    feature is that of the rank with most of it. Steps are averaged per total number of rows, robustly, and the
    coefficients are fitted to those means: what was measured at other sizes is not forgotten while one size rules.
    Coefficients are never negative. What the fit leaves at a size seen often (a CUDA graph's padding) is added back.
    """

    def __init__(self, num_experts: int, num_experts_per_tok: int, num_ranks: int) -> None:
        self._experts = ExpertsCurve(num_experts, num_experts_per_tok, num_ranks)
        self._bins: dict[int, _Bin] = {}
        self._coefficients = np.zeros(4)
        self._sent_per_row = 0.0
        self._num_steps = 0

    @property
    def is_known(self) -> bool:
        """Whether any step has been measured."""
        return bool(self._bins)

    def num_seen(self, num_rows: int) -> float:
        """Return how often steps of about this size were measured lately."""
        found = self._bins.get(_bin_of(num_rows))
        return found.weight if found else 0.0

    def learn_experts(self, num_rows: int, experts: float) -> None:
        """Take one step's count of experts, whatever its rows were for."""
        self._experts.learn(num_rows, experts)

    def learn(self, num_rows: int, max_rows: int, experts: float, rows_sent: float, step_s: float) -> None:
        """Take one step without prompt rows.

        ``num_rows``: of all ranks; the other counts are of the rank with most of them, means over MoE layers.
        """
        self._num_steps += 1
        self._sent_per_row += (rows_sent / max_rows - self._sent_per_row) / min(self._num_steps, _MEMORY)
        if sum(found.weight for found in self._bins.values()) >= _RESIDUAL_SHRINKAGE:
            expected = self.step_s(num_rows, max_rows)
            step_s = min(max(step_s, expected / _CLIP_FACTOR), expected * _CLIP_FACTOR)
        features = np.array([1.0, max_rows, experts, rows_sent])
        number = _bin_of(num_rows)
        is_new = number not in self._bins
        if is_new:
            self._bins[number] = _Bin(features, step_s)
        else:
            self._bins[number].add(features, step_s)
        self._bins[number].last_step = self._num_steps
        if is_new or self._num_steps % _REFIT_STEPS == 0:
            self._fit()

    def step_s(self, num_rows: int, max_rows: int) -> float:
        """Return the expected time of a step; ``num_rows``: of all ranks, ``max_rows``: of the rank with most."""
        fixed, per_row, per_expert, per_sent = self._coefficients
        found = self._bins.get(_bin_of(num_rows))
        residual = found.residual if found else 0.0
        return float(
            fixed
            + (per_row + per_sent * self._sent_per_row) * max_rows
            + per_expert * self._experts.experts(num_rows)
            + residual
        )

    def _fit(self) -> None:
        bins = list(self._bins.values())
        weights = [found.weight * np.exp((found.last_step - self._num_steps) / _FADE_STEPS) for found in bins]
        features, times = [found.features for found in bins], [found.time_s for found in bins]
        most = max(range(len(bins)), key=lambda index: weights[index])
        for factor in (2, 4):
            prior_features, prior_time = self._prior(features[most], times[most], factor)
            features.append(prior_features)
            times.append(prior_time)
            weights.append(_PRIOR_WEIGHT)
        self._coefficients = _fit_nonnegative(np.array(features), np.array(times), np.array(weights))
        for found in bins:
            left = found.time_s - float(self._coefficients @ found.features)
            found.residual = left * found.weight / (found.weight + _RESIDUAL_SHRINKAGE)

    def _prior(self, features: np.ndarray, time_s: float, factor: int) -> tuple[np.ndarray, float]:
        """Return what a step of ``factor`` times the rows is taken to count and cost before one was seen."""
        _, rows, experts, sent = features
        num_rows = max(1, round(rows))
        growth = self._experts.experts(factor * num_rows) / self._experts.experts(num_rows)
        prior_time = time_s * (PRIOR_FIXED_SHARE + (1 - PRIOR_FIXED_SHARE) * growth)
        return np.array([1.0, factor * rows, growth * experts, factor * sent]), prior_time


def _bin_of(num_rows: int) -> int:
    """Return the size that stands for ``num_rows``: itself up to 16, then eighths of octaves."""
    if num_rows <= 16:
        return num_rows
    step = 1 << (num_rows.bit_length() - 4)
    return num_rows // step * step


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
