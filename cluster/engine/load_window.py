"""What experts had to do in the last steps, as ranks have said.

Shapes: R ranks, L MoE layers, E experts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from ...router.rebalance import imbalance
from ...workers.plan import StepResult

_NUM_PARTS = 16
"""How many times in a window ranks are asked: what they say is as long as they hold experts."""


@dataclass(frozen=True, slots=True)
class _Part:
    num_steps: int
    chosen: np.ndarray
    """[R, L, E]"""
    computed: np.ndarray
    """[L, R]"""


class LoadWindow:
    """Loads of the last ``num_steps`` steps, as exact as the parts that they come in."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._part_steps = max(1, num_steps // _NUM_PARTS)
        self._parts: deque[_Part] = deque()
        self._since_asked = self._since_answered = 0
        """Steps that were planned, and that were committed: the next may be planned before the one before commits."""

    def ask(self) -> bool:
        """Take note that a step is planned, and return whether ranks are to be asked in it."""
        self._since_asked += 1
        if self._since_asked < self._part_steps:
            return False
        self._since_asked = 0
        return True

    def void(self) -> None:
        """Take note that what has been planned and not committed comes to nothing."""
        self._since_asked = self._since_answered

    def add(self, result: StepResult) -> None:
        """Take a committed step; what its ranks say, if they were asked, covers the steps since the last time."""
        self._since_answered += 1
        said = [rank.expert_loads for rank in result.ranks]
        if any(loads is None for loads in said):
            return
        self._parts.append(
            _Part(
                self._since_answered,
                np.array([loads.chosen for loads in said if loads], dtype=np.int64),
                np.array([loads.computed for loads in said if loads], dtype=np.int64).T,
            )
        )
        self._since_answered = 0
        while sum(part.num_steps for part in self._parts) - self._parts[0].num_steps >= self._num_steps:
            self._parts.popleft()

    def chosen(self) -> np.ndarray | None:
        """Return [R, L, E]: rows of each rank that chose each expert; None before any were counted."""
        found = sum(part.chosen for part in self._parts) if self._parts else np.zeros(1)
        return found if isinstance(found, np.ndarray) and found.any() else None

    def imbalance(self) -> float | None:
        """Return that of the rows that ranks computed in the last quarter of the window; None where there are none.

        See `router.rebalance`.
        """
        recent = list(self._parts)[-_NUM_PARTS // 4 :]
        computed = sum(part.computed for part in recent)
        return imbalance(computed) if isinstance(computed, np.ndarray) and computed.any() else None
