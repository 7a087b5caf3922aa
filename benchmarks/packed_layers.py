"""What a layer of bfloat16 weights costs by its rows: packed (`workers/packed_weights`) and by torch's own kernels.

A layer of experts of a real model's size (6.3 MB each, four a row) and a linear layer of 17 MB, in turn: torch's
bfloat16 layers, the compiled kernel, FBGEMM's. Enough weights that no cache holds them. One thread, its CPU time. Few
rows are decoding; many are prompts, whose arithmetic is float32 when packed.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.functional import linear

from ..workers import experts, packed_weights
from ..workers.experts import ExpertShard
from ..workers.packed_weights import PackedLinear
from .harness import Measurement, Options, Row, Target, run

HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 128, 8192, 32, 4
OUTPUTS, INPUTS, NUM_LINEAR = 4096, 2048, 12
ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
DECODING = 8
"""Rows up to which packed layers must win."""
ROUNDS = 15
QUICK_ROUNDS = 5
WAYS = ("torch", "compiled", "fbgemm")

Layer = Callable[[int, int], None]
"""Computes as many rows; the second number counts the calls."""


@contextmanager
def _way(name: str) -> Iterator[None]:
    """Let layers made inside be of this way, whatever the processor would choose."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(experts, "packs_weights", lambda dtype, device: name != "torch"))
        if name == "fbgemm":
            stack.enter_context(patch.object(packed_weights, "kernel", lambda: None))
        yield


def expert_layers(generator: torch.Generator) -> dict[str, Layer]:
    """Return a layer of experts in each way."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    settings: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTERMEDIATE,
        "num_experts": NUM_EXPERTS,
    }
    module = Qwen3MoeExperts(Qwen3MoeConfig(**settings, num_experts_per_tok=TOP_K))
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.05).bfloat16()
    given = {}
    for n in ROWS:
        ids = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(n)])
        given[n] = torch.randn(n, HIDDEN, generator=generator), ids, torch.rand(n, TOP_K, generator=generator)

    def layer(way: str) -> Layer:
        with _way(way):
            shard = ExpertShard(copy.deepcopy(module))

        def compute(num_rows: int, call: int) -> None:
            rows, ids, weights = given[num_rows]
            # Other experts each time, as many
            shard.run(rows.bfloat16() if way == "torch" else rows, (ids + 7 * call) % NUM_EXPERTS, weights)

        return compute

    return {way: layer(way) for way in WAYS}


def linear_layers(generator: torch.Generator) -> dict[str, Layer]:
    """Return a linear layer in each way; every call takes the next of several weights."""
    weights = [(torch.randn(OUTPUTS, INPUTS, generator=generator) * 0.02).bfloat16() for _ in range(NUM_LINEAR)]
    rows = torch.randn(max(ROWS), INPUTS, generator=generator)

    def layer(way: str) -> Layer:
        if way == "torch":
            return lambda num_rows, call: _discard(linear(rows[:num_rows].bfloat16(), weights[call % NUM_LINEAR]))
        with _way(way):
            packed: list[nn.Module] = [PackedLinear(weight, None) for weight in weights]
        return lambda num_rows, call: _discard(packed[call % NUM_LINEAR](rows[:num_rows]))

    return {way: layer(way) for way in WAYS}


def _discard(result: torch.Tensor) -> None:
    pass


@torch.inference_mode()
def measure(options: Options) -> Measurement:
    """Time all layers, ways and rows in turn; raise ``RuntimeError`` where the kernel does not compile."""
    if packed_weights.kernel() is None:
        raise RuntimeError("the kernel is compiled where it runs, and that failed")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(options.seed)
    layers = {"experts": expert_layers(generator), "linear": linear_layers(generator)}
    times: dict[tuple[str, int, str], list[float]] = {}
    for round_number in range((QUICK_ROUNDS if options.quick else ROUNDS) + 1):
        for name, ways in layers.items():
            for num_rows in ROWS:
                for way, compute in ways.items():
                    started = time.thread_time()
                    compute(num_rows, round_number)
                    spent = time.thread_time() - started
                    if round_number:  # the first round warms up
                        times.setdefault((name, num_rows, way), []).append(1e3 * spent)
    rows = [_row(name, num_rows, times) for name in layers for num_rows in ROWS]
    targets = [
        Target(f"{name}, torch's time over the compiled kernel's, up to {DECODING} rows", _least(rows, name), 1.0)
        for name in layers
    ]
    return Measurement(rows, targets, "bfloat16", 1)


def _row(layer: str, num_rows: int, times: dict[tuple[str, int, str], list[float]]) -> Row:
    medians = {way: statistics.median(times[layer, num_rows, way]) for way in WAYS}
    return {
        "layer": layer,
        "rows": num_rows,
        "calls": len(times[layer, num_rows, WAYS[0]]),
        **{f"{way}_cpu_ms": value for way, value in medians.items()},
        **{f"torch_over_{way}": medians["torch"] / medians[way] for way in WAYS[1:]},
    }


def _least(rows: list[Row], layer: str) -> float:
    ratios = [row["torch_over_compiled"] for row in rows if row["layer"] == layer and int(row["rows"] or 0) <= DECODING]
    return min(float(ratio or 0) for ratio in ratios)


if __name__ == "__main__":
    sys.exit(run("packed_layers", measure))
