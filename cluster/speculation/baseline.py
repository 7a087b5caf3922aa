"""Measured times of plain decoding steps, and what speculation made of them."""

from __future__ import annotations

from collections import deque
from statistics import median

WINDOW = 16
"""Latest plain steps kept per bucket: few enough to follow a machine that changes."""
ENOUGH = 4
"""Plain steps after which a bucket counts as measured."""


def batch_bucket(num_requests: int) -> int:
    """Return the bucket of a batch: its size up to 4, then half octaves (5-6, 7-8, 9-12, 13-16, ...)."""
    assert num_requests > 0
    if num_requests <= 4:
        return num_requests
    octave = 1 << ((num_requests - 1).bit_length() - 1)
    return octave + octave // 2 if num_requests <= octave + octave // 2 else 2 * octave


class Baseline:
    """Time of a step without drafts, per bucket of (batch size, context length). Measured, never modelled.

    The median of the latest steps stands for a bucket, so one slow step does not disturb it. Context buckets are
    octaves; one not measured yet borrows from the nearest that is, of the same batch size.
    """

    def __init__(self) -> None:
        self._times: dict[int, dict[int, deque[float]]] = {}

    def add(self, num_requests: int, context_len: int, step_s: float) -> None:
        """Take one step without drafts or prompt rows; ``context_len``: the longest of its requests."""
        buckets = self._times.setdefault(batch_bucket(num_requests), {})
        buckets.setdefault(context_len.bit_length(), deque(maxlen=WINDOW)).append(step_s)

    def step_s(self, num_requests: int, context_len: int) -> float | None:
        """Return the time of a plain step, None while too few were seen at this batch size."""
        buckets = self._times.get(batch_bucket(num_requests), {})
        wanted = context_len.bit_length()
        measured = [bucket for bucket, times in buckets.items() if len(times) >= ENOUGH]
        if not measured:
            return None
        return median(buckets[min(measured, key=lambda bucket: (abs(bucket - wanted), bucket))])


class UtilityLedger:
    """What speculation has made of one request: tokens per step over relative step time (Cascade's utility)."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._relative_time = 0.0
        self.baseline_s: float | None = None
        """Time of a plain step when it was last known."""

    def add(self, num_tokens: int, step_s: float, baseline_s: float | None) -> None:
        """Take one step; without a baseline to compare with it counts for nothing."""
        if baseline_s is not None:
            self.baseline_s = baseline_s
            self._num_tokens += num_tokens
            self._relative_time += step_s / baseline_s

    @property
    def utility(self) -> float | None:
        """Tokens per time of a plain step; None before the first step with a baseline."""
        return self._num_tokens / self._relative_time if self._relative_time else None
