"""A pool too small for all: requests lose their KV to older ones and are replayed, and no reader can tell."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.output import LENGTH, RequestOutput
from penstock.cluster.engine.ranks import LocalRanks, Ranks, make_runner
from penstock.workers.plan import Logprobs, StepFailedError, StepPlan, StepResult
from penstock.workers.sampling_params import SamplingParams

from .scripted_ranks import VOCAB, ScriptedRanks, continuation
from .tiny_engine import PROMPTS, Published, config_of, drain, faulty_ranks

MAX_MODEL_LEN = 40


class FaultyRanks(ScriptedRanks):
    """Fails some steps, after they have changed the slots."""

    def __init__(self, rng: random.Random, *args: Any) -> None:
        super().__init__(*args)
        self.rng = rng

    def step(self, plan: StepPlan) -> StepResult:
        result = super().step(plan)
        if self.rng.random() < 0.1:
            raise StepFailedError("planted")
        return result


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    block_size=st.integers(1, 6),
    spare_blocks=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    max_num_seqs=st.integers(1, 6),
    more_rows=st.integers(0, 20),
    draft_len=st.sampled_from([0, 1, 5]),
)
def test_any_traffic_over_small_pools_gets_its_exact_tokens(
    seed: int, block_size: int, spare_blocks: list[int], max_num_seqs: int, more_rows: int, draft_len: int
) -> None:
    rng = random.Random(seed)
    blocks = [-(-MAX_MODEL_LEN // block_size) + spare for spare in spare_blocks]
    ranks = FaultyRanks(rng, blocks, block_size, MAX_MODEL_LEN)
    config = EngineConfig(
        model="m",
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + more_rows,
        draft_len=draft_len,
        max_step_retries=100,
    )
    engine, readers = Engine(config, ranks), Published()
    wanted: dict[str, list[int]] = {}

    def step() -> None:
        readers.take(engine.step())
        engine.scheduler.check_integrity()

    for num_steps in range(80):
        if rng.random() < 0.35:
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, MAX_MODEL_LEN - 1))]
            max_tokens = rng.randint(1, MAX_MODEL_LEN - len(prompt))
            name = str(num_steps)
            engine.add_request(name, prompt, SamplingParams(temperature=0, max_tokens=max_tokens))
            wanted[name] = continuation(prompt, max_tokens)
        if wanted and rng.random() < 0.06:
            engine.abort(gone := rng.choice(list(wanted)))
            if gone not in readers.ended:
                got = readers.get(gone, [])
                assert got == wanted.pop(gone)[: len(got)]
                readers.pop(gone, None)
        step()
    for _ in range(20_000):
        if not engine.has_requests:
            break
        step()
    assert not engine.has_requests, "every request ends"
    assert dict(readers) == wanted
    stats = engine.stats()
    assert stats.num_kv_blocks_used == 0
    own = [output.stats.num_preemptions for output in readers.ended.values() if output.stats]
    assert sum(own) <= stats.num_preemptions, "those of aborted requests are in the total alone"


def test_the_oldest_is_never_preempted_and_the_rest_end_in_order() -> None:
    block_size, blocks = 4, MAX_MODEL_LEN // 4
    config = EngineConfig(model="m", block_size=block_size, max_num_seqs=8, draft_len=0)
    engine, readers = Engine(config, ScriptedRanks([blocks], block_size, MAX_MODEL_LEN)), Published()
    for name in "abcdef":
        engine.add_request(name, [ord(name) % VOCAB] * 4, SamplingParams(temperature=0, max_tokens=36))
    while engine.has_requests:
        readers.take(engine.step())
    preemptions = {name: output.stats.num_preemptions for name, output in readers.ended.items() if output.stats}
    assert list(preemptions) == list("abcdef")
    assert preemptions["a"] == 0
    assert sum(preemptions.values()) == engine.stats().num_preemptions > 0
    assert all(count <= 5 for count in preemptions.values()), "a request loses its place to older ones only"
    for name in "abcdef":
        assert readers[name] == continuation([ord(name) % VOCAB] * 4, 36)


NUM_TOKENS = 60


def _config(directory: Path, num_ranks: int = 1, **changes: Any) -> EngineConfig:
    # 24 blocks for the longest request and one of scratch: a block is 4 tokens x 2 layers x 2 x 2 heads x 8 x 4 B
    options = {"block_size": 4, "max_model_len": 96, "kv_cache_bytes": 25 * 1024, **changes}
    return config_of(directory, num_ranks, **options)


def _serve(config: EngineConfig, ranks: Ranks) -> tuple[Published, int]:
    engine, readers = Engine(config, ranks), Published()
    assert {info.num_kv_blocks for info in ranks.infos} == {24}
    for index, prompt in enumerate(PROMPTS * len(ranks.infos)):
        sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        engine.add_request(str(index), prompt, sampling)
    drain(engine, readers)
    assert engine.stats().num_failed_steps == len(ranks.infos) - 1
    assert {output.finish_reason for output in readers.ended.values()} == {LENGTH}
    return readers, engine.stats().num_preemptions


@pytest.mark.parametrize(
    "options", [{"draft_len": 0}, {"draft_len": 3}, {"draft_len": 3, "max_num_batched_tokens": 9, "max_num_seqs": 5}]
)
def test_replayed_requests_get_the_tokens_of_transformers(
    checkpoint: Callable[[str], Path], reference: Callable[..., list[int]], options: dict[str, Any]
) -> None:
    directory = checkpoint("qwen3_moe")
    config = _config(directory, **options)
    readers, num_preemptions = _serve(config, LocalRanks(make_runner(config, 0)))
    assert num_preemptions > 0
    expected = [reference(directory, prompt, NUM_TOKENS, ignore_eos=True) for prompt in PROMPTS]
    assert [readers[str(index)] for index in range(len(PROMPTS))] == expected


@pytest.mark.distributed
def test_replayed_requests_get_the_tokens_of_transformers_on_two_ranks(
    checkpoint: Callable[[str], Path], reference: Callable[..., list[int]]
) -> None:
    directory = checkpoint("qwen3_moe")
    config = _config(directory, 2, step_timeout_s=30.0)
    # One step of each engine fails too: replays and a new generation must not get in each other's way
    with faulty_ranks(config) as ranks:
        served = [_serve(replace(config, draft_len=draft_len), ranks) for draft_len in (0, 3)]
    expected = [reference(directory, prompt, NUM_TOKENS, ignore_eos=True) for prompt in PROMPTS] * 2
    for readers, num_preemptions in served:
        assert num_preemptions > 0
        assert [readers[str(index)] for index in range(2 * len(PROMPTS))] == expected


def test_penalties_and_log_probabilities_survive_a_replay(checkpoint: Callable[[str], Path]) -> None:
    directory = checkpoint("qwen3_moe")
    sampling = SamplingParams(
        temperature=0.9, seed=5, max_tokens=NUM_TOKENS, ignore_eos=True, repetition_penalty=1.3, frequency_penalty=0.4,
        logprobs=2, prompt_logprobs=1,
    )  # fmt: skip

    def serve(kv_cache_bytes: int) -> tuple[list[RequestOutput], int]:
        config = _config(directory, draft_len=2, kv_cache_bytes=kv_cache_bytes)
        engine = Engine(config, LocalRanks(make_runner(config, 0)))
        for index, prompt in enumerate(PROMPTS):
            engine.add_request(str(index), prompt, sampling)
        merged: dict[str, RequestOutput] = {}
        while engine.has_requests:
            for output in engine.step():
                earlier = merged.get(output.request_id)
                merged[output.request_id] = output if earlier is None else earlier.followed_by(output)
        return [merged[str(index)] for index in range(len(PROMPTS))], engine.stats().num_preemptions

    (roomy, none), (tight, some) = serve(1 << 20), serve(25 * 1024)
    assert (none, some > 0) == (0, True)
    for prompt, one, other in zip(PROMPTS, roomy, tight, strict=True):
        assert one.token_ids == other.token_ids
        _assert_alike(one.logprobs, other.logprobs, NUM_TOKENS)
        if len(prompt) > 1:
            _assert_alike(one.prompt_logprobs, other.prompt_logprobs, len(prompt) - 1)


def _assert_alike(one: Logprobs | None, other: Logprobs | None, length: int) -> None:
    assert one is not None
    assert other is not None
    assert len(one) == len(other) == length
    assert one.token_ids == other.token_ids
    for mine, theirs in zip(one.values, other.values, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
