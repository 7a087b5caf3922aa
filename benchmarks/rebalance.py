"""Experts that turn out to be hot, all on one rank: what rebalancing makes of it, what it costs, and that nobody waits.

In every layer of the demo two experts' weights in the router are turned towards what all texts have in common, so that
most rows choose them; then experts are numbered anew, so that the first rank holds those that are chosen most. Four
ranks serve one kind of text in lock-step, twice: with experts that stay, and with ``enable_eplb``. Rows are those that
ranks count as they compute them, before the first expert moves and after the last. A pause is the time from one
committed step to the next, from the look at the loads until some steps after the last switch, in medians of the run's
own steps. Other work on the machine only lengthens pauses, so of several runs the one whose longest pause is shortest
counts; ``longest_cpu_steps`` is the same of the CPU time of the rank that took most.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from .. import demo
from ..cluster.api.chat_tokenizer import ChatTokenizer
from ..cluster.client.trace_run import trace_routing
from ..cluster.config import EngineConfig
from ..cluster.engine.engine import Engine
from ..cluster.engine.events import REBALANCE, Event
from ..cluster.placement_file import placement_of
from ..cluster.transport.process_ranks import ProcessRanks
from ..demo import prompts
from ..demo.inflate import inflate
from ..demo.records import Family
from ..router.placement import Placement
from ..router.rank_visits import expert_loads
from ..router.rebalance import imbalance
from ..workers.checkpoint import CheckpointReader
from ..workers.plan import StepPlan, StepResult
from ..workers.rebalance_plan import RebalancePlan
from ..workers.sampling_params import SamplingParams
from .harness import Measurement, Options, Row, Target, run
from .ties import EXCUSED_GAP, gap

DEMO = Path(demo.__file__).parent / "model"
FAMILY: Family = "code"
NUM_RANKS, NUM_REDUNDANT, NUM_REQUESTS = 4, 4, 24
NUM_HOT, HOT_SHARE = 2, 0.8
"""Experts of every layer that so many of the prompts' rows are made to choose."""
FACTOR = 8
"""Of inflation: an expert is 786 kB."""
INTERVAL, WINDOW = 100, 64
"""Steps; the second rebalance would come after the end."""
BYTES_PER_STEP = 1 << 19
NUM_TOKENS = 190
RUNS = 3
_SETTLED = 8
"""Steps after the last switch that still count into the longest pause."""


@dataclass(frozen=True, slots=True)
class Step:
    """One committed step."""

    part: RebalancePlan
    computed: np.ndarray | None
    """[R, L], if ranks were asked."""
    has_prompts: bool
    end_s: float
    cpu_s: float
    """Of the thread of the rank that took most."""


class WatchedRanks(ProcessRanks):
    """Ranks, and what went by."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.steps: list[Step] = []

    def collect(self, plan: StepPlan) -> StepResult:
        """Wait for the step."""
        result = super().collect(plan)
        loads = [rank.expert_loads for rank in result.ranks]
        part = plan.ranks[0].rebalance
        assert part is not None
        computed = None if None in loads else np.array([found.computed for found in loads if found])
        has_prompts = any(request.first_sampled_row for rank in plan.ranks for request in rank.requests)
        self.steps.append(
            Step(part, computed, has_prompts, time.perf_counter(), max(rank.thread_time_s for rank in result.ranks))
        )
        return result


@dataclass(frozen=True, slots=True)
class Served:
    """One run."""

    tokens: list[list[int]]
    steps: list[Step]
    events: list[Event]

    def moving(self) -> tuple[int, int]:
        """Return the first step that carries experts and the first that runs under the last placement."""
        first = next(i for i, step in enumerate(self.steps) if step.part.transfers)
        return first, max(i for i, step in enumerate(self.steps) if step.part.changes)

    def gaps(self) -> list[float]:
        """Return the seconds before each step's end, from the second on; prompts make steps longer, so not theirs."""
        return [0.0 if step.has_prompts else step.end_s - before.end_s for before, step in pairwise(self.steps)]

    def median_s(self) -> float:
        """Return the median of `gaps`."""
        return statistics.median(found for found in self.gaps() if found)


def measure(options: Options) -> Measurement:
    """Serve, and compare."""
    tokenizer = ChatTokenizer(str(DEMO))
    chats = [record.chat() for record in prompts.load(FAMILY)][options.seed : options.seed + NUM_REQUESTS]
    texts = [tokenizer.encode_chat(chat) for chat in chats]
    sampling = SamplingParams(temperature=0.8, seed=options.seed, max_tokens=NUM_TOKENS, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(
            model=str(Path(folder) / "model"),
            dtype="float32",
            device="cpu",
            num_threads=1,
            expert_parallel_size=NUM_RANKS,
            max_model_len=1024,
            kv_cache_bytes=64 << 20,
            speculation="off",
            enable_eplb=True,
            num_redundant_experts=NUM_REDUNDANT,
            eplb_window_size=WINDOW,
            eplb_step_interval=INTERVAL,
            eplb_bytes_per_step=BYTES_PER_STEP,
        )
        shares = _plant(Path(folder), config, chats, texts, sampling)
        still = replace(config, eplb_step_interval=1 << 30)
        stays, *runs = _serve([still, config], texts, sampling)
        for _ in range(0 if options.quick else RUNS - 1):
            runs += _serve([config], texts, sampling)
        moved = min(runs, key=_longest)
        altered, excused = _compare(Path(folder) / "hot", moved.tokens, stays.tokens, texts, sampling)
    first, last = moved.moving()
    before, after = _computed(moved.steps[:first]), _computed(moved.steps[last + 1 :])
    unmoved = _computed(stays.steps[last + 1 :])
    (event,) = [event for event in moved.events if event.kind == REBALANCE][:1]
    pause, plain = _longest(moved), max(stays.gaps()) / stays.median_s()
    rows: list[Row] = [
        {
            "layer": str(layer),
            "hottest_expert_share": round(float(shares[layer].max() / shares[layer].sum()), 3),
            "before": round(imbalance(before[:, layer]), 3),
            "after": round(imbalance(after[:, layer]), 3),
            "experts_stay": round(imbalance(unmoved[:, layer]), 3),
        }
        for layer in range(before.shape[1])
    ]
    rows.append(
        {
            "layer": "all",
            "hottest_expert_share": None,
            "before": round(_busiest(before), 3),
            "after": round(_busiest(after), 3),
            "experts_stay": round(_busiest(unmoved), 3),
            "experts_moved": event.num_experts_moved,
            "bytes_moved": event.expert_bytes_loaded,
            "bytes_per_step": BYTES_PER_STEP,
            "steps_moving": last - first + 1,
            "median_step_ms": round(1000 * moved.median_s(), 1),
            "longest_pause_steps": round(pause, 2),
            "longest_cpu_steps": round(_longest_cpu(moved), 2),
            "longest_step_where_experts_stay": round(plain, 2),
            "tokens": sum(map(len, moved.tokens)),
            "tokens_altered": altered,
            "ties_excused": excused,
        }
    )
    return Measurement(
        rows,
        [
            Target("busiest rank's rows over the mean before, planted", _busiest(before), at_least=1.5),
            Target("busiest rank's rows over the mean after", _busiest(after), at_most=1.15),
            Target("and in the worst layer", max(float(row["after"] or 0) for row in rows[:-1]), at_most=1.15),
            Target("longest pause, in median steps", pause, at_most=2.0),
            Target("tokens altered", altered, at_most=0),
        ],
        "float32",
        1,
    )


def _plant(
    folder: Path, config: EngineConfig, chats: Sequence[Any], texts: list[list[int]], sampling: SamplingParams
) -> np.ndarray:
    """Write the model with hot experts, all on the first rank; return the rows [L, E] that chose each."""
    shutil.copytree(DEMO, folder / "hot")
    routers = _hot_routers(texts)
    _rewrite(folder / "hot", lambda tensors: tensors | routers)
    alone = EngineConfig(model=str(folder / "hot"), dtype="float32", device="cpu", max_model_len=1024)
    traced = trace_routing(alone, chats, replace(sampling, max_tokens=NUM_TOKENS // 4))
    loads = expert_loads(traced.ids, traced.num_experts)
    placement = placement_of(replace(config, model=alone.model))
    assert placement is not None
    orders = [_order(placement, layer, loads[layer]) for layer in range(len(loads))]
    _rewrite(folder / "hot", lambda tensors: _renumbered(tensors, orders))
    inflate(folder / "hot", folder / "model", FACTOR)
    return loads


@torch.inference_mode()
def _hot_routers(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Return the routers' weights [E, H] by name, those of the first experts turned towards the rows' mean."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            rows = seen[f"{name}.weight"] = []
            module.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(inputs[0].flatten(0, -2)))
    for text in texts:
        model(torch.tensor([text]))
    made = {}
    for name, inputs in seen.items():
        rows_th, weight = torch.cat(inputs), model.get_parameter(name).clone()
        logits = rows_th @ weight.t()
        needed = logits.topk(model.config.num_experts_per_tok).values[:, -1:] - logits[:, :NUM_HOT]
        mean = rows_th.mean(dim=0)
        weight[:NUM_HOT] += needed.quantile(HOT_SHARE, dim=0)[:, None] * mean / mean.square().sum()
        made[name] = weight
    return made


def _order(placement: Placement, layer: int, loads: np.ndarray) -> list[int]:
    """Return the old number of each expert: the hotter, the lower the rank that alone holds it."""
    holders = placement.holders[layer]
    places = sorted(range(len(holders)), key=lambda expert: (len(holders[expert]), holders[expert]))
    old = [0] * len(holders)
    for place, expert in zip(places, np.argsort(-loads).tolist(), strict=True):
        old[place] = expert
    return old


def _renumbered(tensors: dict[str, torch.Tensor], orders: list[list[int]]) -> dict[str, torch.Tensor]:
    """Return the same model with other numbers for every layer's experts."""
    made = dict(tensors)
    for layer, order in enumerate(orders):
        head = f"model.layers.{layer}.mlp"
        made[f"{head}.gate.weight"] = tensors[f"{head}.gate.weight"][order].contiguous()
        for new, old in enumerate(order):
            for name in ("gate_proj", "up_proj", "down_proj"):
                made[f"{head}.experts.{new}.{name}.weight"] = tensors[f"{head}.experts.{old}.{name}.weight"]
    return made


def _rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    with CheckpointReader(directory) as reader:
        tensors = {key: reader.slice(key)[...].clone() for key in reader.keys()}  # noqa: SIM118 - no mapping
    save_file(change(tensors), directory / "model.safetensors", metadata={"format": "pt"})


def _serve(configs: Sequence[EngineConfig], texts: list[list[int]], sampling: SamplingParams) -> list[Served]:
    """Serve all texts under one configuration after the other, over the same ranks; only the last may move experts."""
    ranks = WatchedRanks(configs[0])
    try:
        return [_serve_on(ranks, config, texts, sampling) for config in configs]
    finally:
        ranks.close()


def _serve_on(ranks: WatchedRanks, config: EngineConfig, texts: list[list[int]], sampling: SamplingParams) -> Served:
    ranks.steps = []
    engine = Engine(config, ranks, events=ranks.events)
    tokens: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        engine.add_request(str(number), text, replace(sampling, seed=number))
    while engine.has_requests:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return Served([tokens[str(number)] for number in range(len(texts))], ranks.steps, ranks.events.events())


def _computed(steps: Sequence[Step]) -> np.ndarray:
    """Return [R, L]: pairs of row and expert that ranks computed, but for what was counted before ``steps``."""
    counted = [step.computed for step in steps if step.computed is not None]
    return np.sum(counted[1:], axis=0)


def _busiest(computed: np.ndarray) -> float:
    return imbalance(computed.T)


def _longest(served: Served) -> float:
    return max(served.gaps()[INTERVAL - 1 : served.moving()[1] + _SETTLED]) / served.median_s()


def _longest_cpu(served: Served) -> float:
    moving = served.steps[INTERVAL : served.moving()[1] + _SETTLED]
    return max(step.cpu_s for step in moving) / statistics.median(step.cpu_s for step in served.steps)


def _compare(
    directory: Path, got: list[list[int]], wanted: list[list[int]], texts: list[list[int]], sampling: SamplingParams
) -> tuple[int, int]:
    """Return how many tokens differ, and how many outputs do for a tie that float32 cannot tell."""
    altered = excused = 0
    for number, (ours, theirs, text) in enumerate(zip(got, wanted, texts, strict=True)):
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if first is None:
            continue
        if gap(directory, text + theirs[:first], len(text), replace(sampling, seed=number)) < EXCUSED_GAP:
            excused += 1
        else:
            altered += len(theirs) - first
    return altered, excused


if __name__ == "__main__":
    sys.exit(run("rebalance", measure))
