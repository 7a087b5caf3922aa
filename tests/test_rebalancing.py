"""Experts move between ranks under live requests: the work evens out, and no token changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.ranks import LocalRanks, make_runner
from penstock.cluster.transport.process_ranks import ProcessRanks
from penstock.workers.sampling_params import SamplingParams

from .tiny_engine import PROMPTS, config_of, generate

pytestmark = pytest.mark.distributed
SAMPLING = SamplingParams(temperature=1.0, seed=5, max_tokens=100, ignore_eos=True, frequency_penalty=0.3)


def config(directory: Path, **options: object) -> EngineConfig:
    options = {"eplb_window_size": 16, "eplb_step_interval": 16, "eplb_bytes_per_step": 3000, **options}
    return config_of(directory, 2, enable_eplb=True, max_num_batched_tokens=24, max_num_seqs=8, **options)


@pytest.fixture(scope="module")
def expected(checkpoint: Callable[[str], Path]) -> list[list[int]]:
    alone = replace(config(checkpoint("qwen3_moe")), expert_parallel_size=1, enable_eplb=False)
    return generate(Engine(alone, LocalRanks(make_runner(alone, 0))), PROMPTS, SAMPLING)


@pytest.fixture(scope="module")
def ranks(checkpoint: Callable[[str], Path]) -> Iterator[ProcessRanks]:
    ranks = ProcessRanks(config(checkpoint("qwen3_moe"), num_redundant_experts=2, num_spares=1))
    yield ranks
    ranks.close()


def test_experts_move_under_live_requests_and_no_token_changes(ranks, expected):
    engine = Engine(ranks._config, ranks, events=ranks.events)
    before = ranks.placed
    assert generate(engine, PROMPTS, SAMPLING) == expected
    print(engine.stats().balance, engine.events.events(), ranks.infos[0].bytes_per_expert)
    print(before, ranks.placed)
