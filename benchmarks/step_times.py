"""What a step costs by its rows and distinct experts: the price list of `benchmarks/speculation`.

Real steps of the demo model inflated to a real model's experts (bfloat16, 6.3 MB each), one rank, one thread. Which
experts rows visit is replaced between router and experts, so that exactly as many distinct ones are read as the grid
says; everything else is the step that a server runs. Thread CPU time, median over rounds that visit the grid in turn.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import torch

from ..workers.dispatch import LocalDispatcher, Received
from ..workers.plan import RankPlan, RequestPlan
from ..workers.runner import ModelRunner
from ..workers.sampling_params import TokenSampling
from .harness import Measurement, Options, Row, Target, run
from .inflated import inflated_runner

PRICES = Path(__file__).parent / "results" / "step_times.json"
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)
EXPERTS = (4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32)
MANY_ROWS = 64
"""From here on nearly all experts are read, and steps take long: a coarser grid does."""
FEW_EXPERTS = (16, 24, 32)
CONTEXT_LEN = 128
ROWS_PER_REQUEST = 8
ROUNDS = 7
QUICK_ROUNDS = 3


class StepTimes:
    """The committed table: time of one rank's step by its rows and its distinct experts per layer."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._seconds = {(int(r["rows"]), int(r["experts"])): 1e-3 * float(r["cpu_ms"]) for r in rows}  # type: ignore[arg-type]
        self._rows = sorted({rows for rows, _ in self._seconds})
        self._experts = {n: sorted(e for rows, e in self._seconds if rows == n) for n in self._rows}

    @classmethod
    def load(cls, file: Path = PRICES) -> StepTimes:
        """Read what this benchmark has written to a file."""
        return cls(json.loads(file.read_text(encoding="utf-8"))["rows"])

    def seconds(self, num_rows: int, experts: float) -> float:
        """Return the time of a step, linear between grid points; a count outside the grid takes its edge."""
        above = min(bisect_right(self._rows, num_rows), len(self._rows) - 1)
        low, high = self._rows[max(above - 1, 0)], self._rows[above]
        share = min(max((num_rows - low) / (high - low), 0.0), 1.0) if high > low else 0.0
        return (1 - share) * self._at(low, experts) + share * self._at(high, experts)

    def step_s(self, rows: Sequence[int], experts: Sequence[Sequence[int]], top_k: int) -> float:
        """Return the time of a step of all ranks in lock-step.

        ``rows``: that each rank runs; ``experts``: distinct ones each computes in each layer. Every phase of a layer
        ends when its slowest rank does, so the fullest rank's rows and the experts of each layer's busiest rank count.
        A rank computes others' rows too, so it may read more experts than its own rows could choose: it is then priced
        as if it had rows enough. The network costs nothing here.
        """
        most = statistics.fmean(map(max, zip(*experts, strict=True)))
        return self.seconds(max(max(rows), round(most / top_k)), most)

    def _at(self, num_rows: int, experts: float) -> float:
        known = self._experts[num_rows]
        above = min(max(bisect_right(known, experts), 1), len(known) - 1) if len(known) > 1 else 0
        high = known[above]
        low = known[max(above - 1, 0)]
        share = (experts - low) / (high - low) if high > low else 0.0
        low_s, high_s = self._seconds[num_rows, low], self._seconds[num_rows, high]
        return low_s + min(max(share, 0.0), 1.0) * (high_s - low_s)


class ForcedRouting(LocalDispatcher):
    """Sends rows to a given number of distinct experts, each row to as many as its router chose."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self.num_distinct = 0
        self._calls = 0

    def dispatch(self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> Received:
        """Return the rows with other experts: the next ones in a circle of ``num_distinct``, begun anew each layer."""
        self._calls += 1
        first = 7 * self._calls
        numbers = torch.arange(expert_ids.numel()) % self.num_distinct
        forced = (first + numbers) % self._num_experts
        return super().dispatch(layer, hidden, forced.view(expert_ids.shape).to(expert_ids.dtype), weights)


def grid(num_experts: int, top_k: int) -> list[tuple[int, int]]:
    """Return the (rows, distinct experts) that can occur on one rank."""
    return [
        (n, e)
        for n, e in itertools.product(ROWS, EXPERTS)
        if top_k <= e <= min(num_experts, top_k * n) and (n < MANY_ROWS or e in FEW_EXPERTS)
    ]


def plan_of(num_rows: int, step_id: int) -> RankPlan:
    """Return a decode step: requests of eight rows each, at one context length."""
    requests, first_block = [], 0
    for number, start in enumerate(range(0, num_rows, ROWS_PER_REQUEST)):
        rows = min(ROWS_PER_REQUEST, num_rows - start)
        num_blocks = -(-(CONTEXT_LEN + ROWS_PER_REQUEST) // 16)
        requests.append(
            RequestPlan(
                request_id=number,
                committed_len=CONTEXT_LEN,
                first_block=0,
                new_blocks=list(range(first_block, first_block + num_blocks)),
                token_ids=[5 + row for row in range(rows)],
                parents=list(range(-1, rows - 1)),
                first_sampled_row=0,
                sampling=TokenSampling(temperature=0.0),
            )
        )
        first_block += num_blocks
    return RankPlan(0, step_id, requests=requests)


def measure(options: Options) -> Measurement:
    """Time the grid."""
    torch.set_num_threads(1)
    _, runner = inflated_runner()
    times = _time(runner, QUICK_ROUNDS if options.quick else ROUNDS)
    rows: list[Row] = [
        {"rows": n, "experts": e, "cpu_ms": 1e3 * statistics.median(values), "steps": len(values)}
        for (n, e), values in times.items()
    ]
    first = StepTimes(rows)
    growth = first.seconds(8, 16) / first.seconds(1, 4)
    return Measurement(rows, [Target("time of 8 rows on 16 experts over 1 row on 4", growth, 1.5)], "bfloat16", 1)


def _time(runner: ModelRunner, num_rounds: int) -> dict[tuple[int, int], list[float]]:
    model = runner.info.model
    routing = ForcedRouting(model.num_experts)
    runner.experts.dispatcher = routing
    points = grid(model.num_experts, model.num_experts_per_tok)
    times: dict[tuple[int, int], list[float]] = {point: [] for point in points}
    step_id = 0
    for round_number in range(num_rounds + 1):
        for num_rows, num_distinct in points:
            routing.num_distinct = num_distinct
            plan = plan_of(num_rows, step_id)
            started = time.thread_time()
            result = runner.step(plan)
            spent = time.thread_time() - started
            step_id += 1
            assert set(result.counts.experts) == {num_distinct}
            if round_number:  # the first round warms up
                times[num_rows, num_distinct].append(spent)
    return times


if __name__ == "__main__":
    sys.exit(run("step_times", measure))
