"""Whole models on a GPU: time of steps, bytes read in them, what budgets save, beside transformers' `generate`.

`python -m penstock.benchmarks.gpu_decode` needs a CUDA device, torch, Triton and transformers, and nothing else. Models
have the shapes of published ones and random weights, and route as unevenly as the demo does (`model_shapes`). For each:

- **steps** of a rank, at batches of 1 to 32 and 1 to 8 rows a request, over contexts of 512 tokens: wall time of plan
  to answer, the graph's own time by CUDA events, bytes that must be read (`step_bytes`) and the share of what a copy in
  this GPU's memory reaches. Random weights accept no drafts, but what a verification costs does not depend on that.
- **budgets** of 75 % and 50 % of the experts that as many rows choose without one.
- **transformers** `generate` with a static cache, compiled, on the same weights, after ours: time per token, from the
  difference of a long and a short output.

And the demo model inflated to a real model's experts, through the engine, on real text: tokens per second by draft
length. A large model takes minutes and up to 65 GB: ``--model NAME`` does one alone. Mixtral's 93 GB need a larger GPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import demo
from ..cluster.config import EngineConfig
from ..cluster.engine.engine import Engine
from ..cluster.engine.ranks import LocalRanks, make_runner
from ..router.expert_budget import ExpertBudget
from ..workers.bucket import MAX_ROWS
from ..workers.plan import RankPlan
from ..workers.runner import ModelRunner
from ..workers.sampling_params import SamplingParams
from ..workers.static_step import StepShape
from .fixed_steps import FixedSteps, step_bytes
from .gpu_experts import copy_rate
from .harness import Measurement, Options, Row, Target, run
from .model_shapes import SHAPES, demo_share, random_model, skew_routers

DEMO = Path(demo.__file__).parent / "model"
FACTOR = 128
CONTEXT = 512
KV_BYTES = 6 << 30
OUTPUTS = (8, 40)
BATCHES = (1, 2, 4, 8, 16, 32)
DRAFT_LENS = (0, 1, 3, 7)
SHARES = (0.75, 0.5)
_WARM_UPS, _REPEATS, _REPLAYS = 4, 20, 8
_GB = 1e9
REQUIRED_ROOFLINE = 0.35
REQUIRED_OF_TRANSFORMERS = 3.0
ALLOWED_HOST_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Timed:
    """Steps of one size."""

    wall_s: float
    """Median, from plan to answer."""
    device_s: float | None
    """Of the graph alone; None where none is replayed."""
    experts: list[float]
    """Distinct experts of each layer, on average."""

    @property
    def experts_per_layer(self) -> float:
        """The mean of layers."""
        return statistics.fmean(self.experts)


@dataclass(slots=True)
class Model:
    """One model, and what is known of it so far."""

    name: str
    runner: ModelRunner
    bytes_per_s: float | None
    """Of a copy in the device's memory; None on a CPU."""
    rows: list[Row] = field(default_factory=list)

    def time(
        self, steps: FixedSteps, draft_len: int, *, graphs: bool = True, budget: ExpertBudget | None = None
    ) -> Timed:
        """Time steps that verify ``draft_len`` drafts of each request, and add a row about them."""
        timed = time_steps(self.runner, lambda: steps.plan(draft_len + 1, budget, padded=graphs))
        needed = step_bytes(self.runner, timed.experts, steps.num_requests, steps.context)
        row: Row = {
            "model": self.name,
            "who": "penstock",
            "batch": steps.num_requests,
            "draft_len": draft_len,
            "budget": "none" if budget is None else str(budget.experts),
            "graphs": graphs,
            "step_ms": timed.wall_s * 1e3,
            "graph_ms": None if timed.device_s is None else timed.device_s * 1e3,
            "rows_per_s": steps.num_requests * (draft_len + 1) / timed.wall_s,
            "experts_per_layer": timed.experts_per_layer,
            "step_gb": needed.total / _GB,
        }
        if self.bytes_per_s is not None:
            row["gb_per_s"] = needed.total / timed.wall_s / _GB
            row["share_of_roofline"] = needed.total / self.bytes_per_s / timed.wall_s
        if timed.device_s is not None:
            row["host_share"] = max(0.0, 1 - timed.device_s / timed.wall_s)
        self.rows.append(row)
        print(row, file=sys.stderr)  # of a run that does not end something is left
        return timed


def time_steps(runner: ModelRunner, plan: Callable[[], RankPlan]) -> Timed:
    """Run steps of one size, each with tokens of its own."""
    for _ in range(_WARM_UPS):
        last = plan()
        runner.step(last)
    walls: list[float] = []
    counts: list[list[int]] = []
    for _ in range(_REPEATS):
        last = plan()
        started = time.perf_counter()
        result = runner.step(last)
        walls.append(time.perf_counter() - started)
        counts.append(result.counts.experts)
    experts = [statistics.fmean(layer) for layer in zip(*counts, strict=True)]
    return Timed(statistics.median(walls), _replay_s(runner, last), experts)


def _replay_s(runner: ModelRunner, plan: RankPlan) -> float | None:
    """Return what the graph of ``plan``, which has just run, takes by itself."""
    graph = None if plan.bucket is None else runner.padded.graphs.graph_of(StepShape.of(plan.bucket, plan.budget))
    if graph is None:
        return None
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_REPLAYS):  # so that what the host takes to launch the first hides behind it
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / _REPLAYS)
    return statistics.median(times)


def budgets(num_experts: float) -> list[ExpertBudget]:
    """Return budgets of shares of ``num_experts``."""
    return [ExpertBudget(experts=max(1, round(share * num_experts))) for share in SHARES]


def measure_steps(model: Model, batches: Sequence[int], draft_lens: Sequence[int], context: int, seed: int) -> None:
    """Time all sizes that are replayed as graphs; without graphs the smallest and the largest; budgets."""
    for batch in batches:
        steps = FixedSteps(model.runner, num_requests=batch, context=context, seed=seed)
        steps.fill()
        for draft_len in draft_lens:
            if batch * (draft_len + 1) > MAX_ROWS:
                continue
            free = model.time(steps, draft_len)
            if batch not in (1, 8) or draft_len not in (draft_lens[0], draft_lens[-1]):
                continue
            model.time(steps, draft_len, graphs=False)
            if draft_len:
                for budget in budgets(free.experts_per_layer):
                    model.time(steps, draft_len, budget=budget)


class Transformers:
    """transformers' `generate` over the weights that ours has used, which is not run again."""

    def __init__(self, name: str, runner: ModelRunner) -> None:
        self._name, self._device = name, runner.device
        self._model: Any = runner.model
        for module in self._model.modules():  # whatever took the place of its code
            vars(module).pop("forward", None)
        self._model.set_attn_implementation("sdpa" if self._model._supports_sdpa else "eager")
        self._model.set_experts_implementation("grouped_mm")

    @torch.inference_mode()
    def row(self, batch: int, context: int, lengths: tuple[int, int], repeats: int) -> Row:
        """Return the time per token, from outputs of two ``lengths``; what cannot run says why."""
        row: Row = {"model": self._name, "who": "transformers", "batch": batch, "draft_len": 0, "budget": "none"}
        ids = torch.randint(self._model.config.get_text_config().vocab_size, (batch, context), device=self._device)

        def generate(length: int) -> float:
            started = time.perf_counter()
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=length,
                min_new_tokens=length,
                cache_implementation="static",
            )
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started

        # What was compiled for other batches would make this one's code one for all
        torch.compiler.reset()
        vars(self._model).pop("_compiled_call", None)
        try:
            for length in sorted(lengths, reverse=True):  # the cache is as long as the longest so far
                generate(length)
            times = [generate(lengths[1]) - generate(lengths[0]) for _ in range(repeats)]
        except Exception as error:  # of torch's compiler, of memory, of transformers
            torch.cuda.empty_cache()
            return {**row, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        step_s = statistics.median(times) / (lengths[1] - lengths[0])
        return {**row, "step_ms": step_s * 1e3, "rows_per_s": batch / step_s}


def inflated_rows(device: str, factor: int, num_prompts: int) -> Iterator[Row]:
    """Serve held-out prompts with the inflated demo, one at a time, by each draft length and by `shadow`."""
    from ..cluster.api.chat_tokenizer import ChatTokenizer
    from ..demo import prompts
    from ..demo.inflate import inflate
    from ..demo.records import FAMILIES

    tokenizer = ChatTokenizer(str(DEMO))
    with tempfile.TemporaryDirectory() as folder:
        inflate(DEMO, Path(folder) / "model", factor)
        common: dict[str, Any] = {"model": str(Path(folder) / "model"), "dtype": "bfloat16", "device": device}
        common |= {"max_model_len": 1024, "kv_cache_bytes": 128 << 20}
        ranks = LocalRanks(make_runner(EngineConfig(**common), 0))
    policies: list[tuple[str, EngineConfig]] = [
        (f"fixed {draft_len}", EngineConfig(**common, draft_len=draft_len)) for draft_len in DRAFT_LENS
    ]
    policies.append(("shadow", EngineConfig(**common, speculation="shadow")))
    for family in FAMILIES:
        texts = [record.messages[0].content for record in prompts.load(family)[:num_prompts]]
        ids = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
        for name, config in policies:
            engine = Engine(config, ranks)
            _serve(engine, ids[:1])
            started = time.perf_counter()
            tokens, steps = _serve(engine, ids)
            yield {
                "model": f"demo x{factor}, {family}",
                "who": "penstock",
                "batch": 1,
                "policy": name,
                "tokens_per_s": tokens / (time.perf_counter() - started),
                "tokens_per_step": tokens / steps,
            }


def _serve(engine: Engine, prompts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return the tokens that came, and in how many steps."""
    tokens = steps = 0
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
        while engine.has_requests:
            tokens += sum(len(output.token_ids) for output in engine.step())
            steps += 1
    return tokens, steps


def targets_of(rows: Sequence[Row]) -> list[Target]:
    """Return what is required of batch 1, for each model that was measured."""

    def one(model: object, who: str, **wanted: object) -> Row:
        wanted = {"who": who, "batch": 1, "budget": "none", **wanted}
        found = [row for row in rows if row["model"] == model and all(row.get(k) == v for k, v in wanted.items())]
        return found[0] if found else {}

    targets = []
    for model in dict.fromkeys(row["model"] for row in rows if "step_ms" in row):
        ours = one(model, "penstock", draft_len=0, graphs=True)
        theirs = one(model, "transformers")
        if isinstance(share := ours.get("share_of_roofline"), float):
            targets.append(Target(f"{model}: share of the roofline at batch 1", share, REQUIRED_ROOFLINE))
        if isinstance(their_ms := theirs.get("step_ms"), float) and isinstance(our_ms := ours.get("step_ms"), float):
            targets.append(
                Target(f"{model}: over transformers at batch 1", their_ms / our_ms, REQUIRED_OF_TRANSFORMERS)
            )
        if isinstance(host := ours.get("host_share"), float):
            name = f"{model}: host's share of a step at batch 1"
            targets.append(Target(name, host, at_most=ALLOWED_HOST_SHARE))
    return targets


def ratios_of(rows: Sequence[Row]) -> list[Row]:
    """Return for each model and batch what the longest draft costs over none, in time and experts, and with budgets."""
    ratios: list[Row] = []
    plain = [row for row in rows if row.get("graphs") and row["draft_len"] == 0]
    for base in plain:
        same = [
            row for row in rows if row.get("graphs") and row["model"] == base["model"] and row["batch"] == base["batch"]
        ]
        longest = max(int(row["draft_len"] or 0) for row in same)
        for row in [row for row in same if row["draft_len"] == longest > 0]:
            ratio: Row = {name: row[name] for name in ("model", "batch", "draft_len", "budget")}
            for name in ("step_ms", "experts_per_layer"):
                ratio[f"{name}_over_one_row"] = float(row[name] or 0) / float(base[name] or 1)
            ratios.append(ratio)
    return ratios


def measure_model(
    name: str,
    device: torch.device,
    share: float,
    bytes_per_s: float,
    options: Options,
    rows: list[Row],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Add to ``rows`` what there is to say of a model, as it is found; raises ``ValueError`` if it does not fit."""
    config, given = SHAPES[name](), options.given
    if given.layers:
        config.num_hidden_layers = given.layers
    need = _num_bytes(config)
    if device.type == "cuda" and need > torch.cuda.get_device_properties(device).total_memory * 0.9:
        raise ValueError(f"its {need / _GB:.0f} GB of weights do not fit this GPU")
    loaded = random_model(config, dtype, device, options.seed)
    runner = ModelRunner(
        model=name,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        max_model_len=CONTEXT * 2,
        loaded=loaded,
        kv_cache_bytes=KV_BYTES,
    )
    reached = skew_routers(runner, loaded.routers, share, options.seed)
    rows.append({"model": name, "distinct_over_uniform": statistics.fmean(reached)})
    model = Model(name, runner, bytes_per_s, rows)
    batches = BATCHES[:1] if options.quick else BATCHES
    measure_steps(model, batches, DRAFT_LENS, CONTEXT, options.seed)
    if given.profile:
        profile(runner, given.profile, options.seed)
    runner.padded.graphs.clear()
    peer = Transformers(name, runner)
    for batch in batches[:1] if options.quick else (1, 8, 32):
        rows.append(peer.row(batch, CONTEXT, OUTPUTS, 3))
        print(rows[-1], file=sys.stderr)


def measure(options: Options) -> Measurement:
    """Measure all models that are asked for, one after the other."""
    device, given = torch.device("cuda", 0), options.given
    names = [given.model] if given.model else list(SHAPES)
    share = demo_share(_demo_runner(device), DEMO)
    bytes_per_s = copy_rate(device) * _GB
    rows: list[Row] = [{"model": "demo", "distinct_over_uniform": share, "copy_gb_per_s": bytes_per_s / _GB}]
    for name in names:
        found: list[Row] = []
        try:
            measure_model(name, device, share, bytes_per_s, options, found)
        except Exception as error:  # what one model cannot do is no reason to lose the others' figures
            found.append({"model": name, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
        rows += [*found, *ratios_of(found)]
        gc.collect()
        torch.cuda.empty_cache()
    if not given.model and not options.quick:
        rows += inflated_rows("cuda", FACTOR, 4)
    return Measurement(rows, targets_of(rows), "bfloat16", 1)


def _demo_runner(device: torch.device) -> ModelRunner:
    return ModelRunner(
        model=str(DEMO), dtype="float32", device=device.type, max_model_len=1024, kv_cache_bytes=64 << 20,
        enforce_eager=True,
    )  # fmt: skip


def _num_bytes(config: Any) -> int:
    from ..workers.loader import build

    return sum(parameter.nbytes for parameter in build(config, torch.bfloat16).model.parameters())


def profile(runner: ModelRunner, path: Path, seed: int) -> None:
    """Write what torch's profiler says of ten steps at batch 1: kernels by their time, and the host's operations."""
    steps = FixedSteps(runner, num_requests=1, context=CONTEXT, seed=seed)
    steps.fill()
    for _ in range(_WARM_UPS):
        runner.step(steps.plan(1, padded=True))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(10):
            runner.step(steps.plan(1, padded=True))
    averages = profiler.key_averages()
    path.write_text(averages.table(sort_by="self_cuda_time_total", row_limit=60), encoding="utf-8")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=SHAPES, help="only this one")
    parser.add_argument("--layers", type=int, metavar="N", help="only so many of each model's layers")
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="write torch's profile of steps at batch 1, of the last model"
    )


def main() -> int:
    """Run from the command line; refuse where there is no GPU."""
    if not torch.cuda.is_available():
        print("gpu_decode: there is no CUDA device here, and a CPU's figures would say nothing of one", file=sys.stderr)
        return 2
    return run("gpu_decode", measure, add_options=_add_options)


if __name__ == "__main__":
    sys.exit(main())
