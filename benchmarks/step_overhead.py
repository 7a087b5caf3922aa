"""How long a step takes besides the model: coordinator to two ranks and back, over the step plane and over Ray.

The same plans and results, in one run, in alternating blocks: the step plane (ZeroMQ under CURVE, MessagePack) against
actor calls to two Ray actors. Serialisation counts on both sides. A plan carries eight decoding requests a rank with
three drafts each; a result carries their tokens and 48 layers' counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from ..cluster.config import EngineConfig
from ..cluster.serving.local_ray import LocalRay
from ..cluster.transport.process_ranks import ProcessRanks
from ..workers.plan import RankPlan, RankResult, RequestPlan, StepPlan
from ..workers.sampling_params import TokenSampling
from .echo_rank import answer
from .harness import Measurement, Options, Row, Target, quantile, run

NUM_RANKS = 2
NUM_REQUESTS = 8
DRAFT_LEN = 3
BLOCK = 100
WARM_UP = 50
REQUIRED_RATIO = 4.0


def plan_of(step_id: int) -> StepPlan:
    """Return a decode step's plan."""
    requests = [
        RequestPlan(
            request_id=key,
            committed_len=500 + step_id,
            first_block=32,
            new_blocks=[],
            token_ids=list(range(DRAFT_LEN + 1)),
            parents=list(range(-1, DRAFT_LEN)),
            first_sampled_row=0,
            sampling=TokenSampling(temperature=1.0, seed=2**62),
        )
        for key in range(NUM_REQUESTS)
    ]
    return StepPlan(0, step_id, [RankPlan(0, step_id, requests=requests) for _ in range(NUM_RANKS)])


class EchoActor:
    """A Ray actor that answers like an echo rank."""

    def step(self, plan: RankPlan, rank: int) -> RankResult:
        """Answer."""
        return answer(plan, rank)


def measure(options: Options) -> Measurement:
    """Time both transports and compare their medians."""
    num_steps = 1000 if options.quick else 10_000
    config = EngineConfig(model="echo", expert_parallel_size=NUM_RANKS)
    with LocalRay(config):
        import ray

        actors: list[Any] = [ray.remote(EchoActor).remote() for _ in range(NUM_RANKS)]
        ranks = ProcessRanks(config, [sys.executable, "-m", "penstock.benchmarks.echo_rank"])
        try:

            def over_ray(plan: StepPlan) -> None:
                calls = [actor.step.remote(plan.ranks[rank], rank) for rank, actor in enumerate(actors)]
                results = ray.get(calls)
                assert len(results) == NUM_RANKS

            def over_step_plane(plan: StepPlan) -> None:
                assert len(ranks.step(plan).ranks) == NUM_RANKS

            times = _interleave({"step plane": over_step_plane, "Ray actor calls": over_ray}, num_steps)
        finally:
            ranks.close()
    rows: list[Row] = [
        {
            "transport": name,
            "ranks": NUM_RANKS,
            "requests_per_rank": NUM_REQUESTS,
            "draft_len": DRAFT_LEN,
            "steps": len(values),
            "p50_us": 1e6 * quantile(values, 0.5),
            "p90_us": 1e6 * quantile(values, 0.9),
            "p99_us": 1e6 * quantile(values, 0.99),
        }
        for name, values in times.items()
    ]
    ratio = quantile(times["Ray actor calls"], 0.5) / quantile(times["step plane"], 0.5)
    return Measurement(
        rows, [Target("p50 of Ray actor calls over p50 of the step plane", ratio, REQUIRED_RATIO)], "none", 1
    )


def _interleave(transports: dict[str, Callable[[StepPlan], None]], num_steps: int) -> dict[str, list[float]]:
    """Time blocks of steps in turn, so that both see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in transports}
    plans = [plan_of(step_id) for step_id in range(BLOCK)]
    for call in transports.values():
        for plan in plans[:WARM_UP]:
            call(plan)
    for _ in range(num_steps // BLOCK):
        for name, call in transports.items():
            for plan in plans:
                started = time.perf_counter()
                call(plan)
                times[name].append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    sys.exit(run("step_overhead", measure))
