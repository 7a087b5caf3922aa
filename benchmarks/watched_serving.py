"""Requests served by one rank's engine, step by step: when each step ended, and what it was."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from ..cluster.config import EngineConfig
from ..cluster.engine.engine import Engine
from ..cluster.engine.ranks import LaunchingRanks
from ..workers.launched_step import LaunchedStep
from ..workers.plan import RankPlan, RankResult, StepPlan, StepResult
from ..workers.runner import ModelRunner
from ..workers.sampling_params import SamplingParams
from ..workers.static_step import StepShape
from .stopwatch import Stopwatch


@dataclass(frozen=True, slots=True)
class ServedStep:
    """What one step was."""

    plan: RankPlan
    experts: list[int]
    """Distinct, per MoE layer."""

    @property
    def contexts(self) -> list[int]:
        """Committed tokens of each request."""
        return [request.committed_len for request in self.plan.requests]

    @property
    def num_rows(self) -> int:
        """Rows of all requests."""
        return sum(len(request.token_ids) for request in self.plan.requests)

    def decodes(self, num_requests: int) -> bool:
        """Whether it is a step of so many requests, all of them past their prompts."""
        requests = self.plan.requests
        return len(requests) == num_requests and all(request.first_sampled_row == 0 for request in requests)


@dataclass(frozen=True, slots=True)
class Served:
    """What came of a batch."""

    wall_s: float
    """Prompts and all."""
    token_ids: list[list[int]]
    steps: list[tuple[ServedStep, float]]
    """Of the whole batch at once, after the prompts: each with the seconds from the end of the step before."""

    @property
    def num_tokens(self) -> int:
        """Of all outputs."""
        return sum(map(len, self.token_ids))


class WatchedRanks(LaunchingRanks):
    """One rank. ``graphs``: whether the engine is to pad steps to buckets, which a GPU replays as graphs."""

    def __init__(self, runner: ModelRunner, *, graphs: bool) -> None:
        super().__init__(runner)
        runner.generation = -1  # an engine counts anew
        self.infos = [replace(runner.info, replays_graphs=graphs)]
        self.steps: list[ServedStep] = []

    def collect(self, plan: StepPlan) -> StepResult:
        """Wait for the step and keep what it was."""
        result = super().collect(plan)
        self.steps.append(ServedStep(plan.ranks[0], result.ranks[0].counts.experts))
        return result


def serve(
    config: EngineConfig, runner: ModelRunner, prompts: Sequence[Sequence[int]], num_tokens: int, *, graphs: bool
) -> Served:
    """Serve ``prompts`` at once, greedily; each gets ``num_tokens``.

    By the host's clock, which is where tokens arrive: a step may have been launched while the one before ran.
    """
    ranks = WatchedRanks(runner, graphs=graphs)
    engine, watch = Engine(config, ranks), Stopwatch(torch.device("cpu"))
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    token_ids: list[list[int]] = [[] for _ in prompts]
    started = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, sampling)
    while engine.has_requests:
        for output in engine.step():
            token_ids[int(output.request_id)] += output.token_ids
        watch.mark()
    wall_s = time.perf_counter() - started
    timed = zip(ranks.steps[1:], watch.intervals_s(), strict=True)
    return Served(wall_s, token_ids, [(step, spent) for step, spent in timed if step.decodes(len(prompts))])


def run_in_turn(runner: ModelRunner, plans: Iterable[RankPlan], watch: Stopwatch) -> list[RankResult]:
    """Run steps one after the other as a rank in service does, which launches them behind each other where that can be.

    ``watch`` marks the beginning and the end of each step on the device.
    """
    results: list[RankResult] = []
    running: LaunchedStep | None = None
    watch.mark()
    for plan in plans:
        if running is not None and not runner.can_follow(plan, running):
            results.append(runner.finish(running))
            running = None
        step = runner.launch(plan, running)
        watch.mark()
        if running is not None:
            results.append(runner.finish(running))
        running = step
    return results if running is None else [*results, runner.finish(running)]


@torch.inference_mode()
def device_s(runner: ModelRunner, plan: RankPlan, repeats: int) -> float:
    """Return the device's own time for the latest step like ``plan``, which was padded: its graph, back to back.

    No host comes between. What a step copies in before and out behind its graph is not in it.
    """
    assert plan.bucket is not None
    shape, watch = StepShape.of(plan.bucket, plan.budget), Stopwatch(runner.device)
    watch.mark()
    for _ in range(repeats):
        runner.padded.graphs.again(shape)
    watch.mark()
    return watch.intervals_s()[0] / repeats
