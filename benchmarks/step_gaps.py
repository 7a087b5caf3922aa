"""How long devices have nothing to do between two steps: steps planned after results, sent ahead, and launched ahead.

A real engine over two ranks behind the step plane. Their devices sleep where a model would compute, and say for how
long they had nothing to do before (`computing_rank`). All ways of stepping take turns. Requests decode plainly; a
result carries 48 layers' counts. Between two steps of which one was sent ahead there is the rank's own work: it
answers, reads the next plan and launches it. Launched ahead, a step waits on the device for the one before.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

from ..cluster.config import EngineConfig
from ..cluster.engine.engine import Engine
from ..cluster.transport.process_ranks import ProcessRanks
from ..workers.plan import StepPlan, StepResult
from ..workers.sampling_params import SamplingParams
from .computing_rank import COMPUTE_VARIABLE, LAUNCH_VARIABLE
from .harness import Measurement, Options, Row, Target, quantile, run

NUM_RANKS = 2
BATCH_SIZES = (1, 8)
"""Requests of each rank."""
COMPUTE_S = (0.005, 0.002, 0.0006)
STEPS = 100
"""Of a turn."""
SKIPPED = 5
"""First steps of a turn: prompts, and what came before."""
PROMPT = [1, 2, 3, 4]
REQUIRED_RATIO = 1.5
MOST_IDLE = 0.05
"""Of a step, with steps launched ahead."""


@dataclass(frozen=True, slots=True)
class Way:
    """How steps follow each other."""

    sends_ahead: bool
    launches_ahead: bool


AFTER, SENT, LAUNCHED = WAYS = Way(False, False), Way(True, False), Way(True, True)


class WatchedRanks(ProcessRanks):
    """Ranks, and how long the device of each had nothing to do before each step."""

    def __init__(self, config: EngineConfig, *, launches_ahead: bool, compute_s: float) -> None:
        self.idle_s: list[float] = []
        os.environ |= {COMPUTE_VARIABLE: str(compute_s), LAUNCH_VARIABLE: str(int(launches_ahead))}
        super().__init__(config, [sys.executable, "-m", "penstock.benchmarks.computing_rank"])

    def collect(self, plan: StepPlan) -> StepResult:
        """Wait for the step."""
        result = super().collect(plan)
        self.idle_s += [rank.thread_time_s for rank in result.ranks]
        return result


def measure(options: Options) -> Measurement:
    """Let all ways take turns at each batch size and compare the medians."""
    rows: list[Row] = []
    targets = []
    for compute_s in COMPUTE_S:
        for batch_size in BATCH_SIZES:
            idle_s = _idle(compute_s, batch_size, 3 if options.quick else 20)
            medians = {way: quantile(found, 0.5) for way, found in idle_s.items()}
            rows += [
                {
                    "async_scheduling": way.sends_ahead,
                    "launched_ahead": way.launches_ahead,
                    "ranks": NUM_RANKS,
                    "requests_per_rank": batch_size,
                    "compute_ms": 1e3 * compute_s,
                    "steps": len(found) // NUM_RANKS,
                    "idle_p50_us": 1e6 * medians[way],
                    "idle_p90_us": 1e6 * quantile(found, 0.9),
                    "idle_mean_us": 1e6 * sum(found) / len(found),
                }
                for way, found in idle_s.items()
            ]
            where = f"{batch_size} requests a rank, steps of {1e3 * compute_s:g} ms"
            if compute_s == COMPUTE_S[0]:
                ratio = medians[AFTER] / medians[SENT]
                targets.append(
                    Target(f"p50 of idle time, planned after over sent ahead, {where}", ratio, REQUIRED_RATIO)
                )
            share = medians[LAUNCHED] / (medians[LAUNCHED] + compute_s)
            targets.append(
                Target(f"p50 of idle time, launched ahead, share of a step, {where}", share, at_most=MOST_IDLE)
            )
    return Measurement(rows, targets, "none", 1)


def _idle(compute_s: float, batch_size: int, turns: int) -> dict[Way, list[float]]:
    config = EngineConfig(model="computing", expert_parallel_size=NUM_RANKS, speculation="off")
    idle_s: dict[Way, list[float]] = {way: [] for way in WAYS}
    with ExitStack() as stack:
        ranks = {
            launches: stack.enter_context(closing(WatchedRanks(config, launches_ahead=launches, compute_s=compute_s)))
            for launches in (False, True)
        }
        for _ in range(turns):
            for way, found in idle_s.items():
                config = replace(config, async_scheduling=way.sends_ahead)
                found += _turn(config, ranks[way.launches_ahead], batch_size)
    return idle_s


def _turn(config: EngineConfig, ranks: WatchedRanks, batch_size: int) -> list[float]:
    """Serve one batch and return how long each device was idle before each decoding step."""
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
