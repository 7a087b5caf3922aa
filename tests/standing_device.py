"""Stands for a GPU where steps are captured: its memory is counted, and its graphs are the steps themselves.

Also the program of a rank that has less of it than the others, which `test_step_graphs` starts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from penstock.workers.graph_capture import Captured
from penstock.workers.graph_room import GraphRoom
from penstock.workers.plan import Bucket
from penstock.workers.runner import ModelRunner
from penstock.workers.static_step import StaticStep
from penstock.workers.step_graphs import StepGraphs

ROW_BYTES = 100
"""That a step needs at once, for each of its rows."""
KEPT_BYTES = 10
"""That its answer keeps, for each of its rows."""


class Recorded:
    """A graph: it does what was captured."""

    def __init__(self, step: StaticStep) -> None:
        self._step, self.num_replays = step, 0

    def replay(self) -> None:
        self._step.run()
        self.num_replays += 1


class StandingDevice:
    """A device that has ``total`` bytes for graphs. ``fails``: what the capture of a bucket raises, if it does."""

    def __init__(self, total: int, fails: Callable[[Bucket], Exception | None] = lambda bucket: None) -> None:
        self.total, self._fails = total, fails
        self.pool_bytes = self._kept_bytes = 0
        self.rehearsed: list[Bucket] = []
        self.tried: list[Bucket] = []
        self.graphs: list[Recorded] = []

    def rehearse(self, step: StaticStep) -> int:
        self.rehearsed.append(step.shape.bucket)
        for _ in range(2):
            step.rehearse()
        return ROW_BYTES * step.shape.bucket.total_rows

    def free_bytes(self) -> int:
        return self.total - self.pool_bytes

    def capture(self, step: StaticStep) -> Captured:
        bucket, before = step.shape.bucket, self.pool_bytes
        self.tried.append(bucket)
        error = self._fails(bucket)
        if error is not None:
            try:
                raise error
            finally:
                raise RuntimeError("the capture was invalidated by an error before")
        self.pool_bytes = max(before, self._kept_bytes + ROW_BYTES * bucket.total_rows)
        if self.pool_bytes > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        kept = KEPT_BYTES * bucket.total_rows
        self._kept_bytes += kept
        self.graphs.append(Recorded(step))
        return Captured(self.graphs[-1], self.pool_bytes - before, kept)

    def clear(self) -> None:
        self.pool_bytes = self._kept_bytes = 0


def stand_in(runner: ModelRunner, device: StandingDevice, room: GraphRoom) -> StepGraphs:
    """Have ``runner`` capture on ``device``."""
    graphs = StepGraphs(runner.padded.step_of, device, room)
    graphs.captures, graphs.agree = runner.padded.graphs.captures, runner.padded.graphs.agree
    runner.padded.graphs = graphs
    return graphs


def main(num_rows: int, short_rank: int) -> None:
    """Be a rank: ``short_rank`` has room for steps of ``num_rows``, and runs out of memory in smaller ones."""
    from penstock.cluster.transport.process_ranks import parent_is_gone, read_settings
    from penstock.cluster.transport.rank_loop import run_rank

    connect = ModelRunner.connect

    def connect_to_devices(runner: ModelRunner, *given: Any) -> None:
        connect(runner, *given)
        is_short = runner.rank == short_rank

        def fails(bucket: Bucket) -> Exception | None:
            return torch.OutOfMemoryError("CUDA out of memory.") if is_short and bucket.total_rows == 2 else None

        stand_in(runner, StandingDevice(1 << 40, fails), GraphRoom(ROW_BYTES * num_rows if is_short else None))

    ModelRunner.connect = connect_to_devices  # type: ignore[method-assign]
    run_rank(read_settings(), parent_is_gone)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
