"""How long ranks have nothing to do between two steps, with steps sent ahead and without.

A real engine over two ranks behind the step plane, which sleep where a model would compute and say for how long they
had nothing to do before. Both ways of stepping take turns over the same ranks. Requests decode plainly; a result
carries 48 layers' counts. What is left between two steps of which one was sent ahead is the rank's own: it answers, and
reads the next plan.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from ..cluster.config import EngineConfig
from ..cluster.engine.engine import Engine
from ..cluster.transport.process_ranks import ProcessRanks
from ..workers.plan import StepPlan, StepResult
from ..workers.sampling_params import SamplingParams
from .computing_rank import COMPUTE_VARIABLE
from .harness import Measurement, Options, Row, Target, quantile, run

NUM_RANKS = 2
BATCH_SIZES = (1, 8)
"""Requests of each rank."""
COMPUTE_S = 0.005
STEPS = 100
"""Of a turn."""
SKIPPED = 5
"""First steps of a turn: prompts, and what came before."""
PROMPT = [1, 2, 3, 4]
REQUIRED_RATIO = 1.5


class WatchedRanks(ProcessRanks):
    """Ranks, and how long each had nothing to do before each step."""

    def __init__(self, config: EngineConfig) -> None:
        self.idle_s: list[float] = []
        super().__init__(config, [sys.executable, "-m", "penstock.benchmarks.computing_rank"])

    def collect(self, plan: StepPlan) -> StepResult:
        """Wait for the step."""
        result = super().collect(plan)
        self.idle_s += [rank.thread_time_s for rank in result.ranks]
        return result


def measure(options: Options) -> Measurement:
    """Let both ways take turns at each batch size and compare the medians."""
    os.environ[COMPUTE_VARIABLE] = str(COMPUTE_S)
    config = EngineConfig(model="computing", expert_parallel_size=NUM_RANKS, speculation="off")
    ranks = WatchedRanks(config)
    rows: list[Row] = []
    targets = []
    try:
        for batch_size in BATCH_SIZES:
            idle_s: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(5 if options.quick else 40):
                for ahead, found in idle_s.items():
                    found += _turn(replace(config, async_scheduling=ahead), ranks, batch_size)
            for ahead, found in idle_s.items():
                rows.append(
                    {
                        "async_scheduling": ahead,
                        "ranks": NUM_RANKS,
                        "requests_per_rank": batch_size,
                        "compute_ms": 1e3 * COMPUTE_S,
                        "steps": len(found) // NUM_RANKS,
                        "idle_p50_us": 1e6 * quantile(found, 0.5),
                        "idle_p90_us": 1e6 * quantile(found, 0.9),
                    }
                )
            ratio = quantile(idle_s[False], 0.5) / quantile(idle_s[True], 0.5)
            name = f"p50 of idle time without over with steps sent ahead, {batch_size} requests a rank"
            targets.append(Target(name, ratio, REQUIRED_RATIO))
    finally:
        ranks.close()
    return Measurement(rows, targets, "none", 1)


def _turn(config: EngineConfig, ranks: WatchedRanks, batch_size: int) -> list[float]:
    """Serve one batch and return how long each rank was idle before each decoding step."""
    ranks.idle_s = []
    engine = Engine(config, ranks)
    sampling = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True)
    for key in range(NUM_RANKS * batch_size):
        engine.add_request(str(key), PROMPT, sampling)
    while engine.has_requests:
        engine.step()
    return ranks.idle_s[NUM_RANKS * SKIPPED :]


if __name__ == "__main__":
    sys.exit(run("step_gaps", measure))
