"""A layer of experts on a GPU: time, bytes read in it, and the share of what a copy reaches, beside others' kernels.

`python -m penstock.benchmarks.gpu_experts` needs a CUDA device, torch, Triton and transformers, and nothing else.
A figure is of one layer, the mean over steps with rows of their own, replayed from a CUDA graph where an
implementation allows its capture (``graph``). Steps go through several layers in turns, as a model's do, so many that
what a step reads has left the GPU's cache before the next step of that layer. GB/s counts the weights of the distinct
experts that a step's rows chose, each once.

``--tune`` looks for better cuts of the kernels first (`tile_search`), for half of the time at most, prints them as
lines for the table in `kernels/expert_tiles`, and measures with them. Each row is kept when it is found (``--json``),
and with ``--budget-s`` none begins when time is over. An implementation that fails has a ``note`` instead of figures.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from . import time_budget
from .harness import Measurement, Options, Row, Target, run
from .replayed_time import copy_rate, seconds_of
from .time_budget import TimeBudget

if TYPE_CHECKING:
    from ..kernels.expert_tiles import LayerTiles
    from .expert_layers import Draw, LayerShape

_ROWS = (1, 2, 4, 8, 16, 32, 64)
_ROUTINGS = ("skewed", "uniform")
_FEW = 16
_AIMED = ("Qwen3-30B-A3B", "Mixtral-8x7B")
_SHARES = {range(1, 2): 0.6, range(4, 33): 0.8}
"""Of a copy's rate, by numbers of rows."""
_STEPS = 16
"""Different steps that are timed together."""
_CACHES = 4
"""So many times what the GPU's cache holds is read between two steps of a layer, at least."""
_CANDIDATE_WARM_S = 0.002
_TUNING_SHARE = 0.5
"""Of the time that a run may take."""

Implementation = Callable[["Draw"], torch.Tensor]
Clock = Callable[[Sequence[Callable[[], Any]]], tuple[float, bool]]


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers of one shape, all stored alike."""

    stored_as: str
    computed_by: dict[str, list[Implementation]]
    """Who computes them: an operation for each layer."""
    expected: Implementation
    """Of the first layer, in f32 by torch's operations."""
    expert_bytes: float


def implementations(module: Any) -> dict[str, Implementation]:
    """Return who computes transformers' experts ``module``, ours first."""
    from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

    from ..workers.gpu_experts import fused

    kernels = fused(module)
    return {
        "penstock": lambda rows: kernels(rows.hidden, rows.expert_ids, rows.weights)[0],
        "transformers batched_mm": lambda rows: batched_mm_experts_forward(
            module, rows.hidden, rows.expert_ids, rows.weights.to(rows.hidden.dtype)
        ),
        "transformers grouped_mm": lambda rows: grouped_mm_experts_forward(
            module, rows.hidden, rows.expert_ids, rows.weights.to(rows.hidden.dtype)
        ),
        "torch grouped_mm": partial(torch_grouped, module),
    }


def torch_grouped(module: Any, rows: Draw) -> torch.Tensor:
    """Compute the experts by torch's grouped product with as few other operations as it takes."""
    num_rows, top_k = rows.expert_ids.shape
    ids, order = rows.expert_ids.flatten().sort()
    offsets = torch.searchsorted(ids, torch.arange(module.num_experts, device=ids.device), right=True).int()
    up, down = module.gate_up_proj, module.down_proj
    if not module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    inner = torch.nn.functional.grouped_mm(rows.hidden[order // top_k], up, offs=offsets)
    if module.has_bias:
        inner = inner + module.gate_up_proj_bias[ids]
    outer = torch.nn.functional.grouped_mm(module._apply_gate(inner), down, offs=offsets)
    if module.has_bias:
        outer = outer + module.down_proj_bias[ids]
    by_pair = torch.empty_like(outer)
    by_pair[order] = outer
    return (by_pair.view(num_rows, top_k, -1).float() * rows.weights[..., None]).sum(dim=1).to(rows.hidden.dtype)


def plain_layers(shape: LayerShape, device: torch.device, cache_bytes: int) -> Layers:
    """Return layers in bf16, which all implementations compute."""
    from ..kernels.grouped_experts import grouped_experts_reference
    from ..workers.gpu_experts import fused
    from .expert_layers import module_of

    first = module_of(shape, device)
    expected = partial(_compute, grouped_experts_reference, fused(first).args)
    expert_bytes = sum(parameter.nbytes for parameter in first.parameters()) / shape.num_experts
    number = num_layers(shape.top_k * expert_bytes, cache_bytes)
    of_layers = [implementations(module) for module in (first, *(module_of(shape, device) for _ in range(number - 1)))]
    computed_by = {name: [layer[name] for layer in of_layers] for name in of_layers[0]}
    return Layers("bf16", computed_by, expected, expert_bytes)


def stored_layers(shape: LayerShape, device: torch.device, cache_bytes: int) -> Layers:
    """Return layers as the checkpoint stores them, which only our kernels compute."""
    from ..kernels.grouped_experts import grouped_experts, grouped_experts_reference
    from .expert_layers import parts_of

    assert shape.stored_as is not None
    first = parts_of(shape, device, as_stored=True)
    expert_bytes = first[0].bytes_per_expert + first[1].bytes_per_expert
    number = num_layers(shape.top_k * expert_bytes, cache_bytes)
    of_layers = [first, *(parts_of(shape, device, as_stored=True) for _ in range(number - 1))]
    ours: list[Implementation] = [partial(_compute, grouped_experts, parts) for parts in of_layers]
    expected = partial(_compute, grouped_experts_reference, first)
    return Layers(shape.stored_as, {"penstock": ours}, expected, expert_bytes)


def _compute(by: Callable[..., Any], parts: tuple[Any, ...], rows: Draw) -> torch.Tensor:
    return by(*parts, rows.hidden, rows.expert_ids, rows.weights)[0]


def num_layers(least_step_bytes: float, cache_bytes: int) -> int:
    """Return how many layers steps go through in turns, of which each step reads so many bytes at least."""
    return 1 + math.ceil(_CACHES * cache_bytes / least_step_bytes)


def measure(options: Options) -> Measurement:
    """Time every shape, routing and number of rows, in one run on one device."""
    from .expert_layers import MODELS

    device = torch.device("cuda")
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    shapes = [shape for shape in MODELS if options.given.model in (None, shape.name)]
    budget = TimeBudget(options.given.budget_s)
    copied = copy_rate(device)
    clock = partial(seconds_of, repeats=5 if options.quick else 20)
    rows: list[Row] = []
    if options.given.tune:
        tune(shapes, device, options.seed, budget.first(_TUNING_SHARE))
    for routing, shape in itertools.product(_ROUTINGS, shapes):
        torch.manual_seed(options.seed)
        kinds = [plain_layers(shape, device, cache_bytes)]
        if shape.stored_as is not None:
            kinds.append(stored_layers(shape, device, cache_bytes))
        for num_rows in (1, 8, 64) if options.quick else _ROWS:
            if not budget.allows(f"{shape.name}, {routing} routing, {num_rows} rows"):
                continue
            draws = steps_of(shape, num_rows, routing, device, options.seed)
            for layers in kinds:
                for row in layer_rows(shape.name, routing, layers, draws, copied, clock):
                    rows.append(row)
                    print(row, file=sys.stderr)
            options.keep(_measured(rows, budget))
        del kinds
        torch.cuda.empty_cache()
    return _measured(rows, budget)


def _measured(rows: list[Row], budget: TimeBudget) -> Measurement:
    return Measurement(rows, targets(rows), "bfloat16 rows", 1, budget.left_out)


def steps_of(shape: LayerShape, num_rows: int, routing: str, device: torch.device, seed: int) -> list[Draw]:
    """Return the rows of the steps that are timed together."""
    from .expert_layers import draw

    return [draw(shape, num_rows, routing, device, seed + step) for step in range(_STEPS)]


def layer_rows(
    model: str, routing: str, layers: Layers, draws: Sequence[Draw], copied: float, clock: Clock
) -> Iterator[Row]:
    """Yield a row for each implementation; ``copied``: a copy's GB/s."""
    first = draws[0]
    expected = layers.expected(first).float()
    num_active = statistics.mean(rows.num_active for rows in draws)
    for name, of_layers in layers.computed_by.items():
        row: Row = {
            "model": model,
            "weights": layers.stored_as,
            "routing": routing,
            "rows": len(first.hidden),
            "experts": round(num_active, 1),
            "layers": len(of_layers),
            "implementation": name,
        }
        try:
            result = of_layers[0](first).float()
            seconds, captured = clock(
                [partial(compute, rows) for compute, rows in zip(itertools.cycle(of_layers), draws, strict=False)]
            )
        except torch.AcceleratorError:  # the device is lost to this process
            raise
        except torch.OutOfMemoryError:
            yield {**row, "note": "out of memory"}
        except Exception as error:  # others' kernels have limits of their own, ours a target
            reason = str(error).splitlines() or [""]
            yield {**row, "note": f"{type(error).__name__}: {reason[0]}"}
        else:
            rate = num_active * layers.expert_bytes / seconds / 1e9
            yield {
                **row,
                "us": round(seconds * 1e6, 1),
                "gb_per_s": round(rate),
                "copy_gb_per_s": round(copied),
                "share_of_copy": round(rate / copied, 3),
                "graph": captured,
                "difference": round(float((result - expected).norm() / expected.norm()), 5),
            }
            continue
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def targets(rows: Sequence[Row]) -> list[Target]:
    """Return what the rows say of each target; one of which nothing was measured is left out."""

    def key(row: Row, *names: str) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("model", "routing", "rows", *names))

    def time_of(row: Row) -> float:
        return float(row["us"])  # type: ignore[arg-type]

    timed = [row for row in rows if "us" in row]
    ours = [row for row in timed if row["implementation"] == "penstock"]
    others: dict[tuple[Any, ...], float] = {}
    for row in timed:
        if row not in ours:
            others[key(row, "weights")] = min(others.get(key(row, "weights"), math.inf), time_of(row))
    few = [row for row in ours if int(row["rows"]) <= _FEW and key(row, "weights") in others]  # type: ignore[arg-type]
    ratios = [others[key(row, "weights")] / time_of(row) for row in few]
    aimed = [row for row in ours if row["weights"] == "bf16" and row["model"] in _AIMED]
    in_bf16 = {key(row): time_of(row) for row in ours if row["weights"] == "bf16"}
    gains = [in_bf16[key(row)] / time_of(row) for row in ours if row["weights"] != "bf16" and key(row) in in_bf16]
    failed = sum(row["implementation"] == "penstock" and "us" not in row for row in rows)
    found = [Target("rows that ours failed to compute", failed, at_most=0)] if rows else []
    if ours:
        name = "difference from the reference's results, of their norm"
        found.append(Target(name, max(float(row["difference"]) for row in ours), at_most=1e-2))  # type: ignore[arg-type]
    if ratios:
        name = f"time of the fastest other over ours, up to {_FEW} rows, least"
        found.append(Target(name, min(ratios), at_least=1.5))
    for rows_of, least in _SHARES.items():
        shares = [float(row["share_of_copy"]) for row in aimed if row["rows"] in rows_of]  # type: ignore[arg-type]
        if shares:
            name = f"share of the copy's rate, {rows_of[0]} to {rows_of[-1]} rows of {' and '.join(_AIMED)}, least"
            found.append(Target(name, min(shares), at_least=least))
    if gains:
        found.append(Target("time of ours in bf16 over ours as stored, least", min(gains), at_least=1.0))
    return found


def tune(shapes: Sequence[LayerShape], device: torch.device, seed: int, budget: TimeBudget) -> None:
    """Find, print and use the best cuts of each shape, in bf16 and as stored, by one and eight rows together."""
    from ..kernels import expert_tiles
    from .tile_search import PARTS, Compiled, Layer, candidates, fastest

    properties = torch.cuda.get_device_properties(device)
    layers = [Layer(shape, stored) for shape in shapes for stored in (False, True) if shape.stored_as or not stored]
    compiled = Compiled(10 * properties.major + properties.minor)
    try:
        cuts = {
            layer: {
                part: compiled.fit(layer, part, list(candidates(layer, part, properties.multi_processor_count)))
                for part in PARTS
            }
            for layer in layers
        }
        for layer in layers:
            if not budget.allows(f"cuts of {layer.key}"):
                continue
            seconds = _seconds_by_cut(layer, device, seed, properties.L2_cache_size)
            present_s = seconds(layer.tiles())
            best, best_s = fastest(layer, cuts[layer], seconds, lambda: budget.is_over)
            print(f"    {layer.key}: {best},  # {best_s * 1e6:.1f} us, before {present_s * 1e6:.1f}", flush=True)
            expert_tiles.MEASURED[layer.key] = best
            torch.cuda.empty_cache()
    finally:
        compiled.close()


def _seconds_by_cut(layer: Any, device: torch.device, seed: int, cache_bytes: int) -> Callable[[LayerTiles], float]:
    from ..kernels.grouped_experts import grouped_experts
    from .expert_layers import draw, parts_of

    shape = layer.shape
    first = parts_of(shape, device, as_stored=layer.as_stored)
    step_bytes = shape.top_k * (first[0].bytes_per_expert + first[1].bytes_per_expert)
    number = num_layers(step_bytes, cache_bytes)
    of_layers = [first, *(parts_of(shape, device, as_stored=layer.as_stored) for _ in range(number - 1))]
    draws = [draw(shape, n, "skewed", device, seed + step) for step in range(_STEPS // 2) for n in (1, 8)]

    def seconds(tiles: LayerTiles) -> float:
        calls = [
            partial(grouped_experts, *parts, rows.hidden, rows.expert_ids, rows.weights, tiles)
            for parts, rows in zip(itertools.cycle(of_layers), draws, strict=False)
        ]
        try:
            return seconds_of(calls, 10, _CANDIDATE_WARM_S)[0]
        except torch.AcceleratorError:
            raise
        except Exception as error:  # Triton has classes of its own for a cut that does not fit
            print(f"{tiles}: {type(error).__name__}", file=sys.stderr)
            return math.inf

    return seconds


def _options(parser: argparse.ArgumentParser) -> None:
    from .expert_layers import MODELS

    parser.add_argument("--model", choices=[shape.name for shape in MODELS], help="only this model's shape")
    parser.add_argument("--tune", action="store_true", help="look for better cuts first")
    time_budget.add_option(parser)


def main() -> int:
    """Run from the command line; refuse where there is no GPU."""
    if not torch.cuda.is_available():
        print(
            "gpu_experts: there is no CUDA device here, and a CPU's figures would say nothing of one", file=sys.stderr
        )
        return 2
    with torch.inference_mode():
        return run("gpu_experts", measure, add_options=_options)


if __name__ == "__main__":
    sys.exit(main())
