"""Ranks in processes of their own that are sent steps ahead: failures and deaths lose nothing."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock.benchmarks.ahead_ranks import AheadRanks
from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.ranks import LocalRanks
from penstock.workers.runner import ModelRunner
from penstock.workers.sampling_params import SamplingParams

from .tiny_engine import PROMPTS, Published, config_of, drain, generate

SAMPLED = SamplingParams(temperature=1.0, seed=5, max_tokens=40, ignore_eos=True)
STEP_TIMEOUT_S = 20.0


def _config(directory: Path, **options: Any) -> EngineConfig:
    return config_of(
        directory, 2, draft_len=0, max_num_batched_tokens=24, max_num_seqs=8, step_timeout_s=STEP_TIMEOUT_S, **options
    )


@pytest.fixture(scope="module")
def of_one_rank(checkpoint: Callable[[str], Path], runner: ModelRunner) -> list[list[int]]:
    """Return the tokens of one rank, a step after the other."""
    runner.generation = -1
    config = replace(_config(checkpoint("qwen3_moe"), block_size=4, max_model_len=96), expert_parallel_size=1)
    return generate(Engine(config, LocalRanks(runner)), PROMPTS, SAMPLED)


@pytest.mark.distributed
@pytest.mark.parametrize("early", [False, True], ids=["after its collectives", "before them"])
def test_two_ranks_are_sent_steps_ahead_and_survive_a_failure(
    checkpoint: Callable[[str], Path], of_one_rank: list[list[int]], monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    """One rank fails a step behind which another waits: the other is in the collectives of that or of the next."""
    if early:
        monkeypatch.setenv("PENSTOCK_TEST_FAIL_EARLY", "1")
    config = _config(checkpoint("qwen3_moe"))
    if early:
        config = replace(config, step_timeout_s=2.0)
    ranks = AheadRanks(config, [sys.executable, str(Path(__file__).with_name("faulty_rank.py"))])
    try:
        engine = Engine(config, ranks)
        started = time.monotonic()
        assert generate(engine, PROMPTS, SAMPLED) == of_one_rank
        if not early:
            assert time.monotonic() - started < STEP_TIMEOUT_S, "no rank waits for its timeout"
        assert engine.stats().num_failed_steps == 1
        assert ranks.num_ahead > 0.9 * (ranks.num_steps - 2)
        assert ranks._epoch == 2, "what the other says of the step behind keeps them from meeting no second time"
        num_ahead = ranks.num_ahead
        plain = Engine(replace(config, async_scheduling=False), ranks)
        assert generate(plain, PROMPTS, SAMPLED) == of_one_rank
        assert ranks.num_ahead == num_ahead
        wanted = plain.stats()
        for name in ("num_steps", "num_generation_tokens", "num_prompt_tokens"):
            assert getattr(engine.stats(), name) == getattr(wanted, name), name
    finally:
        ranks.close()


@pytest.mark.distributed
def test_a_rank_that_dies_with_a_step_under_way(
    checkpoint: Callable[[str], Path], of_one_rank: list[list[int]]
) -> None:
    config = _config(checkpoint("qwen3_moe"))
    ranks = AheadRanks(config)
    try:
        for when in ("between steps", "within one"):
            engine, published = Engine(config, ranks), Published()
            for index, prompt in enumerate(PROMPTS):
                engine.add_request(str(index), prompt, SAMPLED)
            for _ in range(9):
                published.take(engine.step())
            assert engine.has_requests
            victim = ranks._roster.of_rank[1].process._process  # type: ignore[attr-defined]
            if when == "between steps":
                os.kill(victim.pid, signal.SIGKILL)
                victim.wait()
            else:
                ranks.meanwhile = lambda victim=victim: os.kill(victim.pid, signal.SIGKILL)
                published.take(engine.step())
                ranks.meanwhile = lambda: None
            drain(engine, published)
            assert [published[str(index)] for index in range(len(PROMPTS))] == of_one_rank
            assert engine.scheduler.num_replays > 0
    finally:
        ranks.close()
