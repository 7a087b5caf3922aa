"""Times between marks, by the device's own clock where it is a GPU."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch


class Stopwatch:
    """Marks points in a device's work. On a GPU a mark is an event: it waits for nothing, and costs the host little."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Mark where the device's work has come to: what has been launched before belongs to the time before."""
        if not self._is_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def intervals_s(self) -> list[float]:
        """Return the seconds between marks, waiting for the last, and begin anew."""
        marks, self._marks = self._marks, []
        if not self._is_gpu:
            return [after - before for before, after in pairwise(marks)]
        if marks:
            marks[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]
