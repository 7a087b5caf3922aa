"""One model of random weights decoding: our engine beside transformers, and steps of many rows under budgets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..cluster.config import EngineConfig
from ..router.expert_budget import ExpertBudget
from ..workers.runner import ModelRunner
from .fixed_steps import MOST_ROWS, FixedSteps
from .generate_peer import GeneratePeer
from .harness import Row
from .model_shapes import ModelShape
from .random_model import Skew, random_model
from .step_bytes import ByteCounter
from .stopwatch import Stopwatch
from .time_budget import TimeBudget
from .watched_serving import Served, ServedStep, device_s, run_in_turn, serve

BLOCK_SIZE = 16
PROMPT_ROWS = 512
"""Of a step that computes prompts."""
SHARES = (0.75, 0.5)
"""Budgets, of the distinct experts that the same rows read without one."""
_PROBES = 4


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and how it is measured."""

    device: torch.device
    copy_gb_per_s: float
    skew: Skew
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32)
    draft_lens: Sequence[int] = (0, 1, 3, 7)
    context: int = 512
    num_tokens: int = 32
    rounds: int = 3
    steps: int = 8
    """Of a point in a round."""
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16
    peer: bool = True
    """Whether transformers is measured too."""
    budget: TimeBudget = field(default_factory=lambda: TimeBudget(None))


@dataclass(frozen=True, slots=True)
class Point:
    """What a step of a fixed plan is."""

    batch: int
    draft_len: int
    graph: bool
    share: float | None = None
    budget: ExpertBudget | None = None


@dataclass(slots=True)
class _Timed:
    seconds: list[float] = field(default_factory=list)
    experts: list[list[int]] = field(default_factory=list)
    """Per step and MoE layer."""


class WholeModel:
    """The model on one rank, in memory that transformers shares."""

    def __init__(self, shape: ModelShape, bench: Bench) -> None:
        self._shape, self._bench = shape, bench
        longest = max(bench.batches)
        prompt_steps = -(-longest * bench.context // PROMPT_ROWS)
        # Those whose prompts are computed first must not end before the last has begun
        self._num_tokens = bench.num_tokens + 2 * prompt_steps
        length = bench.context + max(self._num_tokens, MOST_ROWS) + BLOCK_SIZE
        self._config = EngineConfig(
            model=shape.name,
            dtype=str(bench.dtype).removeprefix("torch."),
            device=bench.device.type,
            num_threads=1,
            draft_len=0,
            block_size=BLOCK_SIZE,
            max_model_len=length,
            max_num_seqs=longest,
            max_num_batched_tokens=PROMPT_ROWS + longest,
            kv_cache_bytes=(longest + 1) * (length + BLOCK_SIZE) * kv_token_bytes(shape.config(), bench.dtype),
        )
        config = self._config
        self.runner = ModelRunner(
            model=shape.name,
            dtype=config.dtype,
            device=config.device,
            max_model_len=length,
            block_size=BLOCK_SIZE,
            kv_cache_bytes=config.kv_cache_bytes,
            loaded=random_model(shape.config(), bench.device, dtype=bench.dtype, skew=bench.skew, seed=bench.seed),
        )
        self._bytes = ByteCounter(self.runner)

    @cached_property
    def _peer(self) -> GeneratePeer:
        return GeneratePeer(self._shape.config(), self.runner.model, self._bench.device)

    def rows(self) -> Iterator[Row]:
        """Measure ours, batch by batch."""
        for batch in self._bench.batches:
            if self._bench.budget.allows(f"{self._shape.name}, batch {batch}"):
                yield self._decode(batch)
                yield from self._steps(batch)
                self.runner.padded.graphs.clear()

    def peer_rows(self) -> Iterator[Row]:
        """Measure transformers batch by batch, in turns with ours."""
        for batch in self._bench.batches if self._bench.peer else ():
            if self._bench.budget.allows(f"{self._shape.name}, transformers at batch {batch}"):
                yield self._decode_by_peer(batch)
                self.runner.padded.graphs.clear()

    # --- whole requests ----------------------------------------------------------------------------------------------

    def _serve(self, batch: int) -> Served:
        return serve(self._config, self.runner, self._prompts(batch), self._num_tokens, graphs=True)

    def _prompts(self, batch: int) -> list[list[int]]:
        steps = self._fixed(batch)
        return [steps.tokens(number) for number in range(batch)]

    def _timed_steps(self, served: Served) -> list[tuple[ServedStep, float]]:
        return served.steps[1 : 1 + self._bench.num_tokens]

    def _decode(self, batch: int) -> Row:
        bench = self._bench
        served = [self._serve(batch) for _ in range(bench.rounds + 1)]
        timed = [pair for one in served[1:] for pair in self._timed_steps(one)]
        seconds = statistics.median(spent for _, spent in timed)
        found = [self._bytes.of(step.experts, step.contexts, step.num_rows).total for step, _ in timed]
        plan = served[-1].steps[-1][0].plan
        own_s = device_s(self.runner, plan, bench.steps) if plan.bucket is not None else None
        return {
            **self._named("decode", batch, 0),
            "engine": "penstock",
            "graph": plan.bucket is not None,
            "steps": len(timed),
            **self._figures(seconds, [step.experts for step, _ in timed], statistics.fmean(found)),
            "tokens_per_s": round(batch / seconds, 1),
            **_host(seconds, own_s),
        }

    def _decode_by_peer(self, batch: int) -> Row:
        row: Row = {**self._named("decode", batch, 0), "engine": "transformers"}
        prompts = self._prompts(batch)
        self._serve(batch)
        if not self._peer_steps(prompts):
            return {**row, "note": "out of memory"}
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(self._bench.rounds):
            ours += [spent for _, spent in self._timed_steps(self._serve(batch))]
            theirs += self._peer_steps(prompts)
        seconds = statistics.median(theirs)
        return {
            **row,
            "steps": len(theirs),
            "step_ms": 1e3 * seconds,
            "tokens_per_s": round(batch / seconds, 1),
            "penstock_over_it": seconds / statistics.median(ours),
        }

    def _peer_steps(self, prompts: Sequence[Sequence[int]]) -> list[float]:
        """Return what steps of transformers took; nothing where the memory does not allow it."""
        try:
            return self._peer.generate(prompts, self._bench.num_tokens).steps_s[1:]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return []

    # --- steps of fixed plans ----------------------------------------------------------------------------------------

    def _fixed(self, batch: int) -> FixedSteps:
        config, bench = self.runner.info.model, self._bench
        return FixedSteps(batch, bench.context, config.vocab_size, BLOCK_SIZE, config.max_model_len, bench.seed)

    def _steps(self, batch: int) -> Iterator[Row]:
        bench, steps = self._bench, self._fixed(batch)
        self.runner.generation = -1  # the plans' requests are others than the engine's
        for plan in steps.prompts(PROMPT_ROWS):
            self.runner.step(plan)
        points = [
            Point(batch, draft_len, graph)
            for draft_len in bench.draft_lens
            for graph in ((True, False) if self._pads(steps, draft_len) else (False,))
        ]
        points += self._budgeted(steps, batch)
        timed = {point: _Timed() for point in points}
        for number in range(bench.rounds + 1):
            for point in points:
                self._time(steps, point, timed[point], number, keep=number > 0)
        for point in points:
            yield self._step_row(steps, point, timed[point])

    def _budgeted(self, steps: FixedSteps, batch: int) -> Iterator[Point]:
        """Yield the points under budgets that leave out some of what is read without one."""
        model = self.runner.info.model
        for draft_len in self._bench.draft_lens if model.steerable else ():
            if not draft_len:
                continue
            plans = (steps.verification(-probe - 1, draft_len + 1, padded=False) for probe in range(_PROBES))
            distinct = statistics.fmean(statistics.fmean(self.runner.step(plan).counts.experts) for plan in plans)
            for share in SHARES:
                kept = max(model.num_experts_per_tok, math.ceil(share * distinct))
                if kept < distinct:
                    graph = self._pads(steps, draft_len)
                    yield Point(batch, draft_len, graph, share, ExpertBudget(experts=kept))

    @staticmethod
    def _pads(steps: FixedSteps, draft_len: int) -> bool:
        """Whether an engine would pad such steps: none of many rows."""
        return steps.verification(0, draft_len + 1, padded=True).bucket is not None

    def _time(self, steps: FixedSteps, point: Point, timed: _Timed, number: int, *, keep: bool) -> None:
        first = number * self._bench.steps
        plans = [
            steps.verification(first + step, point.draft_len + 1, point.budget, padded=point.graph)
            for step in range(self._bench.steps if keep else 1)
        ]
        watch = Stopwatch(self._bench.device)
        results = run_in_turn(self.runner, plans, watch)
        if keep:
            timed.seconds += watch.intervals_s()
            timed.experts += [result.counts.experts for result in results]

    def _step_row(self, steps: FixedSteps, point: Point, timed: _Timed) -> Row:
        num_rows = point.batch * (point.draft_len + 1)
        seconds = statistics.median(timed.seconds)
        contexts = [self._bench.context] * point.batch
        read = statistics.fmean(self._bytes.of(experts, contexts, num_rows).total for experts in timed.experts)
        plan = steps.verification(0, point.draft_len + 1, point.budget, padded=point.graph)
        own_s = None
        if plan.bucket is not None:
            self.runner.step(plan)
            own_s = device_s(self.runner, plan, self._bench.steps)
        return {
            **self._named("step", point.batch, point.draft_len),
            "engine": "penstock",
            "graph": plan.bucket is not None,
            "padded_rows": None if plan.bucket is None else plan.bucket.total_rows,
            "budget": "none" if point.share is None else f"{point.share:.0%}",
            "budget_experts": None if point.budget is None else point.budget.experts,
            "steps": len(timed.seconds),
            **self._figures(seconds, timed.experts, read),
            "rows_per_s": round(num_rows / seconds, 1),
            **_host(seconds, own_s),
        }

    def profile(self) -> tuple[Row, str]:
        """Return a row and a table by torch's profiler, of steps of one row in graphs."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        steps, is_gpu = self._fixed(1), self._bench.device.type == "cuda"
        self.runner.generation = -1
        for plan in [*steps.prompts(PROMPT_ROWS), steps.verification(0, 1, padded=True)]:
            self.runner.step(plan)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
        watch = Stopwatch(self._bench.device)
        with profile(activities=activities) as found:
            plans = [steps.verification(step, 1, padded=True) for step in range(self._bench.steps)]
            run_in_turn(self.runner, plans, watch)
        events: Any = found.key_averages()
        # Operations are charged with their kernels as well, so count kernels alone
        kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
        busy_us = sum(event.self_device_time_total for event in kernels)
        row: Row = {
            **self._named("profile", 1, 0),
            "engine": "penstock",
            "graph": True,
            "steps": self._bench.steps,
            "step_ms": 1e3 * sum(watch.intervals_s()) / self._bench.steps,
            "kernels_ms": busy_us / 1e3 / self._bench.steps,
        }
        order = "self_device_time_total" if is_gpu else "self_cpu_time_total"
        return row, events.table(sort_by=order, row_limit=40)

    # --- what rows share ---------------------------------------------------------------------------------------------

    def _named(self, part: str, batch: int, draft_len: int) -> Row:
        return {
            "part": part,
            "model": self._shape.name,
            "stored_as": str(self._bench.dtype).removeprefix("torch."),
            "context": self._bench.context,
            "batch": batch,
            "draft_len": draft_len,
            "rows": batch * (draft_len + 1),
        }

    def _figures(self, seconds: float, experts: Sequence[Sequence[int]], read: float) -> Row:
        return figures(seconds, experts, read, self._bench.copy_gb_per_s)


def figures(seconds: float, experts: Sequence[Sequence[int]], read: float, copy_gb_per_s: float) -> Row:
    """Return a step's time, the distinct ``experts`` per layer of its runs, and its bytes against the roofline."""
    return {
        "step_ms": 1e3 * seconds,
        "experts": round(statistics.fmean(statistics.fmean(step) for step in experts), 2),
        "gb": read / 1e9,
        "gb_per_s": read / 1e9 / seconds,
        "roofline_ms": read / copy_gb_per_s / 1e6,
        "share_of_roofline": read / copy_gb_per_s / 1e9 / seconds,
    }


def _host(seconds: float, own_s: float | None) -> Row:
    """Return the device's own time, and what the host adds to it."""
    if own_s is None:
        return {}
    return {"device_ms": 1e3 * own_s, "host_share": max(0.0, 1 - own_s / seconds)}


def kv_token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Return the most that one token's keys and values can take, whatever a layer keeps of them."""
    heads = config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = max(width, getattr(config, "qk_nope_head_dim", 0) + getattr(config, "qk_rope_head_dim", 0))
    values = max(width, getattr(config, "v_head_dim", None) or 0)
    latent = getattr(config, "kv_lora_rank", None)
    numbers = latent + config.qk_rope_head_dim if latent else heads * (keys + values)
    return int(numbers * config.num_hidden_layers * dtype.itemsize)
