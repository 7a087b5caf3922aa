"""Ranks whose collectives go by way of the host, as they do where two share a GPU."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.ranks import LocalRanks, make_runner
from penstock.workers.process_group import anything_twice, open_store
from penstock.workers.sampling_params import SamplingParams

from .tiny_engine import PROMPTS, config_of, generate

if TYPE_CHECKING:
    from penstock.cluster.transport.process_ranks import ProcessRanks

SAMPLING = SamplingParams(temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)


@pytest.mark.distributed
@pytest.mark.parametrize("budget", [None, "experts=4,scope=global"])
def test_tokens_are_the_same_by_way_of_the_host(
    checkpoint: Callable[[str], Path], budget: str | None, process_ranks: type[ProcessRanks]
) -> None:
    config = replace(config_of(checkpoint("qwen3_moe"), 2), expert_budget=budget, draft_len=2)
    found = []
    for command in ((), (sys.executable, str(Path(__file__).with_name("staging_rank.py")))):
        ranks = process_ranks(config, command)
        try:
            found.append(generate(Engine(config, ranks), PROMPTS, SAMPLING))
        finally:
            ranks.close()
    assert found[0] == found[1]


@pytest.mark.distributed
def test_experts_move_by_way_of_the_host(checkpoint: Callable[[str], Path], process_ranks: type[ProcessRanks]) -> None:
    config = moving(config_of(checkpoint("qwen3_moe"), 2))
    ranks = process_ranks(config, (sys.executable, str(Path(__file__).with_name("staging_rank.py"))))
    try:
        expected = generate(Engine(replace(config, eplb_step_interval=1 << 30), ranks), PROMPTS, SAMPLING)
        before = ranks.placed
        assert generate(Engine(config, ranks), PROMPTS, SAMPLING) == expected
        assert before is not None
        assert ranks.placed is not None
        assert ranks.placed.placement != before.placement
    finally:
        ranks.close()


def moving(config: EngineConfig) -> EngineConfig:
    """Have experts move at once, all in one step."""
    batch = {"max_num_batched_tokens": 24, "max_num_seqs": 8}
    eplb = {"num_redundant_experts": 2, "eplb_window_size": 1, "eplb_step_interval": 1, "eplb_bytes_per_step": 1 << 20}
    return replace(config, enable_eplb=True, **eplb, **batch)


@pytest.mark.parametrize(("devices", "expected"), [(["a", "b", "c"], False), (["a", "b", "a"], True)])
def test_all_ranks_hear_whether_any_share_a_device(devices: list[str], expected: bool) -> None:
    store, address = open_store("127.0.0.1")
    heard: dict[int, bool] = {}

    def ask(rank: int) -> None:
        client = dist.TCPStore(address.host, address.port, is_master=False, timeout=timedelta(seconds=20))
        heard[rank] = anything_twice(client, rank, len(devices), devices[rank])

    asking = [threading.Thread(target=ask, args=(rank,)) for rank in range(len(devices))]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    del store
    assert heard == dict.fromkeys(range(len(devices)), expected)


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("moves", [False, True])
def test_two_ranks_share_a_gpu(
    checkpoint: Callable[[str], Path], process_ranks: type[ProcessRanks], moves: bool
) -> None:
    alone = replace(config_of(checkpoint("qwen3_moe")), device="cuda")
    config = replace(alone, expert_parallel_size=2)
    if moves:
        config = moving(config)
    ranks = process_ranks(config)
    try:
        found = generate(Engine(config, ranks), PROMPTS, SAMPLING)
    finally:
        ranks.close()
    assert found == generate(Engine(alone, LocalRanks(make_runner(alone, 0))), PROMPTS, SAMPLING)
