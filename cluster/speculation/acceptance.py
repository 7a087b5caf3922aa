"""How likely a drafted token is right: learned per evidence and draft position, and per request."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right

from .observation import ShadowTrial
from .proposal import Evidence

_MATCH_EDGES = (1, 2, 3, 4, 8, 16)
_FREQUENCY_EDGES = (0.3, 0.45, 0.55, 0.68, 0.78, 0.88)
_LAST_POSITION = 3
"""Draft positions from here on share cells."""
_PRIOR = (0.3, 0.35, 0.5, 0.6, 0.75)
"""Of a token that continues a match of 0, 1, 2, 3, 4 or more tokens, before anything is learned."""
_SHRINKAGE = 8.0
"""Observations that a coarser cell's estimate counts for in a finer one."""
_MEMORY = 200.0
"""Observations a cell remembers: older ones fade, so that drift is followed."""
_OFFSET_VARIANCE = 1.0
"""Variance between requests of the log-odds of being right."""
_OFFSET_MEMORY = 0.95
"""Share of a request's certainty that is left after each observation."""


_Address = tuple[str, int, int, int]
"""Drafter, class of match length, class of frequency, draft position; negative where a cell does not ask."""


class _Cell:
    __slots__ = ("logit", "right", "total")

    def __init__(self) -> None:
        self.right = self.total = 0.0
        self.logit: float | None = None
        """The estimate when the cell last learned; its parents move too slowly to matter in between."""


class _Request:
    """How much likelier than elsewhere this request's drafts are right, in log-odds, and how certain that is."""

    __slots__ = ("offset", "precision")

    def __init__(self) -> None:
        self.offset, self.precision = 0.0, 1 / _OFFSET_VARIANCE

    def learn(self, expected: float, right: bool) -> None:
        # One step of a Kalman filter on a Bernoulli observation; certainty fades towards the prior's
        self.precision = _OFFSET_MEMORY * self.precision + (1 - _OFFSET_MEMORY) / _OFFSET_VARIANCE
        self.precision += expected * (1 - expected)
        self.offset += (right - expected) / self.precision


class AcceptanceModel:
    """Probability that a drafted token is right, given that those before it are.

    Three nested cells, (drafter, match length), + frequency, + draft position, each shrunk to the coarser one and the
    coarsest to a prior; and one offset per request, in log-odds, since requests differ more than evidence tells.
    """

    def __init__(self) -> None:
        self._cells: dict[_Address, _Cell] = {}
        self._requests: dict[int, _Request] = {}

    def probabilities(self, key: int, evidence: Evidence, draft_len: int) -> list[float]:
        """Return per draft position the probability of its token, given that the ones before it are right."""
        request = self._requests.get(key)
        offset = request.offset if request else 0.0
        return [_sigmoid(self._logit(evidence, position) + offset) for position in range(draft_len)]

    def learn(self, trial: ShadowTrial) -> None:
        """Take one proposal's comparison with the text."""
        request = self._requests.setdefault(trial.key, _Request())
        for position in range(trial.first, trial.num_known):
            right = position < trial.num_right
            request.learn(_sigmoid(self._logit(trial.evidence, position) + request.offset), right)
            self._learn_cells(trial.evidence, position, right)

    def forget(self, key: int) -> None:
        """Drop what was kept for a request; what all requests taught stays."""
        self._requests.pop(key, None)

    def _logit(self, evidence: Evidence, position: int) -> float:
        cell = self._cells.get(_finest(evidence, position))
        if cell is not None and cell.logit is not None:
            return cell.logit
        return self._estimate(evidence, position)

    def _estimate(self, evidence: Evidence, position: int) -> float:
        estimate = _PRIOR[min(evidence.match_len + position, len(_PRIOR) - 1)]
        for address in _addresses(evidence, position):
            cell = self._cells.get(address)
            if cell is not None:
                estimate = (cell.right + _SHRINKAGE * estimate) / (cell.total + _SHRINKAGE)
        return math.log(estimate / (1 - estimate))

    def _learn_cells(self, evidence: Evidence, position: int, right: bool) -> None:
        cell = _Cell()
        for address in _addresses(evidence, position):
            cell = self._cells.setdefault(address, _Cell())
            kept = min(1.0, _MEMORY / (cell.total + 1))
            cell.right = cell.right * kept + right
            cell.total = cell.total * kept + 1
        cell.logit = self._estimate(evidence, position)


def _classes(evidence: Evidence, position: int) -> tuple[int, int]:
    """Return the classes of match length and frequency; a drafter without frequencies has a class of its own."""
    match, frequencies = bisect_right(_MATCH_EDGES, evidence.match_len), evidence.frequencies
    return match, bisect_left(_FREQUENCY_EDGES, frequencies[position]) if position < len(frequencies) else -1


def _finest(evidence: Evidence, position: int) -> _Address:
    return evidence.source, *_classes(evidence, position), min(position, _LAST_POSITION)


def _addresses(evidence: Evidence, position: int) -> tuple[_Address, ...]:
    """Return the cells of a draft position, coarsest first."""
    match, frequency = _classes(evidence, position)
    source, last = evidence.source, min(position, _LAST_POSITION)
    return (source, match, -2, -1), (source, match, frequency, -1), (source, match, frequency, last)


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))
