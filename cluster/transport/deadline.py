"""How long to wait for ranks that do the same thing together."""

from __future__ import annotations

_GRACE_S = 0.5
"""Ranks that leave one collective leave it within milliseconds of each other; a loaded machine may add some."""
_LATEST = 2.0
"""Ranks leave a hung collective by themselves, at most one timeout after they entered it, which may be as late as the
timeout itself. So a rank that has not answered after two is stuck or gone."""


class Deadline:
    """Of one round of answers: when a rank that has not answered counts as lost.

    Ranks work in lock-step, so that once one has answered, whether it succeeded or gave up, the others are as far. Then
    the rest get ``timeout_s`` from the start, if that has not passed, and half a second; before, twice as long. A rank
    that works alone gets ``timeout_s`` and half a second.
    """

    def __init__(self, timeout_s: float, started_s: float, *, alone: bool = False) -> None:
        self._timeout_s, self._started_s = timeout_s, started_s
        self.at_s = started_s + timeout_s + _GRACE_S if alone else started_s + _LATEST * timeout_s

    def answered(self, now_s: float) -> None:
        """Take note of an answer."""
        self.at_s = min(self.at_s, max(self._started_s + self._timeout_s, now_s) + _GRACE_S)
