"""What a GPU takes for operations, by its own clock: many of them in one CUDA graph, so that no host is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ..workers.failed_capture import end_capture

_COPIED_BYTES = 1 << 31
"""Many times what a GPU's cache holds."""
_WARM_S = 0.05
"""Of the same work before it is timed: an idle GPU's clocks rise in this time."""


def copy_rate(device: torch.device) -> float:
    """Return GB/s that a copy of random bytes within the device's memory reads and writes."""
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    seconds, _ = seconds_of([partial(target.copy_, source)], repeats=20)
    del source, target
    torch.cuda.empty_cache()  # models are asked to fit what is free
    return 2 * _COPIED_BYTES / seconds / 1e9


def seconds_of(calls: Sequence[Callable[[], Any]], repeats: int, warm_s: float = _WARM_S) -> tuple[float, bool]:
    """Return what one of ``calls`` takes, the median over ``repeats`` of their mean, and whether a graph ran them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph, stream, pool = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            for call in calls:
                call()
        replay: Callable[[], Any] = graph.replay
        captured = True
    except RuntimeError as error:  # it asks the device for a number, or plans on the host
        torch.cuda.set_stream(stream)  # torch leaves the one that it captured on
        torch.cuda.synchronize()
        end_capture(pool)
        if isinstance(error, torch.OutOfMemoryError):
            raise
        captured = False

        def replay() -> None:
            for call in calls:
                call()

    started = time.perf_counter()
    while time.perf_counter() - started < warm_s:
        replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times), captured
