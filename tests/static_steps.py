"""Steps to be padded: contexts and rows of three requests, a runner for them, and ranks that ask for padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.ranks import Ranks
from penstock.workers.bucket import Padding
from penstock.workers.plan import LayerCounts, RankPlan, RequestPlan
from penstock.workers.runner import ModelRunner
from penstock.workers.sampling_params import SamplingParams, TokenSampling

from .tiny_engine import PROMPTS, FailingRanks, controller_of, generate

BLOCK = 4
SEEDED = TokenSampling(temperature=0.8, seed=(7 << 40) + 11, choice=2)
DRAWN = SamplingParams(temperature=1.0, seed=5, max_tokens=20, ignore_eos=True)
TREE = [-1, 0, 0, 1, 2]
CONTEXT = {0: 21, 1: 8, 2: 30}
"""Committed tokens of each request."""


def runner_of(directory: Path) -> ModelRunner:
    return ModelRunner(model=str(directory), block_size=BLOCK, max_model_len=64, kv_cache_bytes=1 << 20)


def chain(num_rows: int) -> list[int]:
    return list(range(-1, num_rows - 1))


def request(key: int, parents: list[int], sampling: TokenSampling, **options: Any) -> RequestPlan:
    tokens = [(11 * key + 5 * row + 3) % 90 for row in range(len(parents))]
    return RequestPlan(key, CONTEXT[key], 12, [], tokens, parents, 0, sampling, **options)


def blocks(key: int) -> list[int]:
    """Twelve of sixteen, out of order."""
    return [16 * key + (5 * place + 3) % 16 for place in range(12)]


def prompts() -> RankPlan:
    """Contexts of three requests."""
    tokens = [[(13 * key + 7 * place + 2) % 90 for place in range(length)] for key, length in CONTEXT.items()]
    requests = [
        RequestPlan(key, 0, 0, blocks(key), text, chain(len(text)), len(text), TokenSampling())
        for key, text in enumerate(tokens)
    ]
    return RankPlan(0, 0, requests=requests)


STEPS = {
    "plain": [request(0, [-1], TokenSampling()), request(1, [-1], SEEDED), request(2, [-1], TokenSampling())],
    "one": [request(2, chain(4), SEEDED)],
    "mixed": [request(0, chain(4), SEEDED), request(1, [-1], TokenSampling()), request(2, TREE, SEEDED)],
    "filtered": [request(0, chain(3), replace(SEEDED, top_k=3)), request(1, chain(2), SEEDED)],
}


def padded(plan: RankPlan, runner: ModelRunner) -> RankPlan:
    bucket = Padding(BLOCK, runner.max_model_len).bucket_of([plan.requests])
    assert bucket is not None
    return replace(plan, bucket=bucket)


def exact_counts(counts: LayerCounts) -> list[list[int]]:
    return [counts.rows, counts.experts, counts.rows_sent, counts.payload_bytes, counts.budgeted_rows]


class Padded:
    """Ranks that ask for padded steps."""

    def __init__(self, ranks: Ranks) -> None:
        self.infos = [replace(info, replays_graphs=True) for info in ranks.infos]
        self.step, self.recover, self.close = ranks.step, ranks.recover, ranks.close


def outputs_of(
    config: Any,
    ranks: Ranks,
    draft_len: int | str,
    params: SamplingParams,
    texts: list[list[int]] = PROMPTS,
) -> tuple[list[Any], FailingRanks]:
    watched = FailingRanks(ranks, lambda call: False)
    return generate(Engine(config, watched, controller=controller_of(draft_len)), texts, params), watched
