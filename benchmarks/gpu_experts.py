"""A layer of experts on a GPU: time, bytes read in it, and the share of what a copy reaches, beside others' kernels.

`python -m penstock.benchmarks.gpu_experts` needs a CUDA device, torch, Triton and transformers, and nothing else.
A figure is of one layer, the mean over steps with rows of their own, replayed from a CUDA graph where an
implementation allows its capture (``graph``). GB/s counts the weights of the distinct experts that a step's rows chose,
each once. ``--tune`` looks for better cuts of the kernels, and prints lines for the table in `kernels/expert_tiles`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .harness import Measurement, Options, Row, Target, run

if TYPE_CHECKING:
    from ..kernels.expert_tiles import LayerTiles
    from ..kernels.expert_weights import ExpertWeights
    from ..kernels.grouped_experts import Gate
    from .expert_layers import Draw, LayerShape

_ROWS = (1, 2, 4, 8, 16, 32, 64)
_ROUTINGS = ("skewed", "uniform")
_COPIED_BYTES = 1 << 31
_STEPS = 16
"""Different steps that are timed together: one step's weights alone might stay in the GPU's cache."""

Implementation = Callable[["Draw"], torch.Tensor]


def copy_rate(device: torch.device) -> float:
    """Return GB/s that a copy within the device's memory reads and writes."""
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds, _ = seconds_of([partial(target.copy_, source)], repeats=20)
    return 2 * _COPIED_BYTES / seconds / 1e9


def seconds_of(calls: Sequence[Callable[[], Any]], repeats: int) -> tuple[float, bool]:
    """Return what one of ``calls`` takes, the median over ``repeats`` of their mean, and whether a graph ran them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        replay: Callable[[], Any] = graph.replay
        captured = True
    except RuntimeError:  # it asks the device for a number, or plans on the host
        torch.cuda.set_stream(stream)  # torch leaves the one that it captured on
        torch.cuda.synchronize()
        captured = False

        def replay() -> None:
            for call in calls:
                call()

    replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times), captured


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


def measure(options: Options) -> Measurement:
    """Time every shape, routing and number of rows, in one run on one device."""
    from .expert_layers import MODELS

    device = torch.device("cuda")
    shapes = [shape for shape in MODELS if options.given.model in (None, shape.name)]
    copied = copy_rate(device)
    rows: list[Row] = []
    for shape in shapes:
        if options.given.tune:
            tune(shape, device, options.seed)
        rows += _layer_rows(shape, device, options, copied)
        torch.cuda.empty_cache()
    return Measurement(rows, _targets(rows), "bfloat16 rows", 1)


def _layer_rows(shape: LayerShape, device: torch.device, options: Options, copied: float) -> Iterator[Row]:
    from ..kernels.grouped_experts import grouped_experts, grouped_experts_reference
    from .expert_layers import draw, gate_of, module_of, stored

    torch.manual_seed(options.seed)
    module = module_of(shape, device)
    module_bytes = sum(parameter.nbytes for parameter in module.parameters())
    parts = {"bf16": (implementations(module), module_bytes / shape.num_experts)}
    if shape.stored_as is not None:
        (up, down), gate = stored(shape, device), gate_of(shape)
        ours = {"penstock": lambda rows: grouped_experts(up, down, gate, rows.hidden, rows.expert_ids, rows.weights)[0]}
        expected_of_stored = partial(grouped_experts_reference, up, down, gate)
        parts[shape.stored_as] = (ours, up.bytes_per_expert + down.bytes_per_expert)
    for routing, num_rows in itertools.product(_ROUTINGS, (1, 8, 64) if options.quick else _ROWS):
        draws = [draw(shape, num_rows, routing, device, options.seed + step) for step in range(_STEPS)]
        num_active = statistics.mean(rows.num_active for rows in draws)
        for stored_as, (computed_by, expert_bytes) in parts.items():
            first = draws[0]
            if stored_as == "bf16":
                expected = computed_by["transformers grouped_mm"](first).float()
            else:
                expected = expected_of_stored(first.hidden, first.expert_ids, first.weights)[0].float()
            for name, compute in computed_by.items():
                result = compute(first).float()
                seconds, captured = seconds_of([partial(compute, rows) for rows in draws], 5 if options.quick else 20)
                rate = num_active * expert_bytes / seconds / 1e9
                yield {
                    "model": shape.name,
                    "weights": stored_as,
                    "routing": routing,
                    "rows": num_rows,
                    "experts": round(num_active, 1),
                    "implementation": name,
                    "us": round(seconds * 1e6, 1),
                    "gb_per_s": round(rate),
                    "copy_gb_per_s": round(copied),
                    "share_of_copy": round(rate / copied, 3),
                    "graph": captured,
                    "difference": round(float((result - expected).norm() / expected.norm()), 5),
                }


def _targets(rows: list[Row]) -> list[Target]:
    ours = [row for row in rows if row["implementation"] == "penstock"]
    others: dict[tuple[Any, ...], float] = {}

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("model", "weights", "routing", "rows"))

    for row in rows:
        if row not in ours:
            others[key(row)] = min(others.get(key(row), float("inf")), float(row["us"]))  # type: ignore[arg-type]
    ratios = [others[key(row)] / float(row["us"]) for row in ours if key(row) in others]  # type: ignore[arg-type]
    differences = [float(row["difference"]) for row in ours]  # type: ignore[arg-type]
    shares = [float(row["share_of_copy"]) for row in ours if row["weights"] == "bf16"]  # type: ignore[arg-type]
    in_bf16 = {key(row | {"weights": None}): float(row["us"]) for row in ours if row["weights"] == "bf16"}  # type: ignore[arg-type]
    gains = [
        in_bf16[key(row | {"weights": None})] / float(row["us"])  # type: ignore[arg-type]
        for row in ours
        if row["weights"] != "bf16"
    ]
    targets = [
        Target(
            "difference from grouped_mm's results, or the reference's, of their norm", max(differences), at_most=1e-2
        ),
        Target("time of the fastest other over ours, least", min(ratios), at_least=1.0),
        Target("share of the copy's rate, bf16, least", min(shares), at_least=0.7),
    ]
    if gains:
        targets.append(Target("time of ours in bf16 over ours as stored, least", min(gains), at_least=1.0))
    return targets


def tune(shape: LayerShape, device: torch.device, seed: int) -> None:
    """Print the best cuts of both projections, in bf16 and as stored, by the time of one and of eight rows together."""
    from ..workers.gpu_experts import fused
    from .expert_layers import gate_of, module_of, stored

    up, down, gate = fused(module_of(shape, device)).args
    _tune_layer(shape, up, down, gate, device, seed)
    if shape.stored_as is not None:
        _tune_layer(shape, *stored(shape, device), gate_of(shape), device, seed)


def _tune_layer(
    shape: LayerShape, up: ExpertWeights, down: ExpertWeights, gate: Gate, device: torch.device, seed: int
) -> None:
    from ..kernels.expert_tiles import layer_tiles
    from ..kernels.expert_weights import FP8
    from ..kernels.grouped_experts import grouped_experts
    from .expert_layers import draw

    draws = [draw(shape, n, "skewed", device, seed + step) for n in (1, 8) for step in range(_STEPS // 2)]

    def seconds(tiles: LayerTiles) -> float:
        calls = [
            partial(grouped_experts, up, down, gate, rows.hidden, rows.expert_ids, rows.weights, tiles)
            for rows in draws
        ]
        try:
            return seconds_of(calls, 10)[0]
        except Exception as error:  # Triton has classes of its own for a cut that does not fit
            print(f"{tiles}: {type(error).__name__}", file=sys.stderr)
            return float("inf")

    shared = up.block[1] if up.format == FP8 else None
    key = shape.hidden_size, shape.inner_size, shape.top_k, up.bytes_per_weight
    best = layer_tiles(*key, scale_inputs=shared)
    best_s = seconds(best)
    for part in ("up", "down"):
        splits = (1,) if part == "up" else (1, 2, 4)
        for outputs, inputs, split, warps, stages in itertools.product(
            (32, 64, 128), (64, 128, 256), splits, (4, 8), (3, 4, 6)
        ):
            if shared is not None and inputs > shared:
                continue
            cut = replace(
                getattr(best, part), outputs=outputs, inputs=inputs, splits=split, num_warps=warps, num_stages=stages
            )
            candidate = replace(best, **{part: cut})
            if (candidate_s := seconds(candidate)) < best_s:
                best, best_s = candidate, candidate_s
    print(f"    {key}: {best},  # {best_s * 1e6:.1f} us")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", help="only this model's shape")
    parser.add_argument("--tune", action="store_true", help="look for better cuts first: minutes a model")


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
