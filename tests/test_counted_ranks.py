"""What benchmarks count of a request is what the rank itself counts when the request is alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from penstock.benchmarks.counted_ranks import CountedRanks
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.ranks import make_runner
from penstock.router.budgeted_selection import LayerRanks

from .tiny_engine import GREEDY, PROMPTS, FailingRanks, config_of, generate


def test_experts_and_visits_of_a_lone_request(checkpoint: Callable[[str], Path]) -> None:
    config = config_of(checkpoint("qwen3_moe"), draft_len=3)
    runner = make_runner(config, 0)
    # Every expert on a rank of its own, the request at home with the first
    layers = [LayerRanks(torch.arange(len(layer.owner)), len(layer.owner), 0) for layer in runner.layers]
    counted = CountedRanks(runner, layers)
    failing = FailingRanks(counted, lambda call: False)
    generate(Engine(config, failing), PROMPTS[1:2], GREEDY)
    decoding = [result.ranks[0].counts for result in failing.results[-len(counted.counts.steps) :]]
    assert any(step.num_rows > 1 for step in counted.counts.steps)
    for step, counts in zip(counted.counts.steps, decoding, strict=True):
        assert step.experts == counts.experts
        pairs = step.num_rows * len(counts.experts)  # of a row and a layer: two experts each, at most one at home
        assert pairs <= step.visits <= 2 * pairs
