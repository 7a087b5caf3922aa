"""Which shapes get graphs, what those may take, and that a rank serves on where memory ends."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.ranks import LocalRanks, make_runner
from penstock.workers.graph_capture import CudaCapturer, is_out_of_memory
from penstock.workers.graph_room import GraphRoom
from penstock.workers.plan import Bucket, RankPlan
from penstock.workers.runner import ModelRunner
from penstock.workers.static_step import StaticStep
from penstock.workers.step_graphs import StepGraphs

from .standing_device import KEPT_BYTES, ROW_BYTES, StandingDevice, stand_in
from .test_static_step import BLOCK, STEPS, Padded, padded, prompts
from .tiny_engine import GREEDY, PROMPTS, FailingRanks, config_of, generate

if TYPE_CHECKING:
    from penstock.cluster.transport.process_ranks import ProcessRanks

BUCKETS = {(1, 1): 1, (1, 2): 2, (1, 4): 4, (2, 1): 2, (2, 2): 4, (2, 4): 8, (4, 1): 4, (4, 2): 8, (4, 4): 16}
"""Rows of those that four requests of four rows can need."""
ENOUGH = 1 << 30


@pytest.fixture(scope="module")
def runner(checkpoint: Callable[[str], Path]) -> ModelRunner:
    return make_runner(config_of(checkpoint("qwen3_moe"), block_size=4, max_model_len=96, kv_cache_bytes=1 << 20), 0)


OPTIONS: dict[str, Any] = {
    "block_size": 4,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "speculation": "fixed",
    "draft_len": 3,
}


def engine_over(ranks: Padded, num_ranks: int = 1) -> tuple[Engine, FailingRanks]:
    watched = FailingRanks(ranks, lambda call: False)
    config = config_of(Path("m"), num_ranks, **OPTIONS)
    return Engine(config, watched), watched


def served(runner: ModelRunner, graphs: StepGraphs) -> list[list[int]]:
    """Warm up, serve, and return the tokens."""
    assert runner.padded.graphs is graphs
    runner.generation = -1
    engine, _ = engine_over(Padded(LocalRanks(runner)))
    engine.warm_up()
    tokens = generate(engine, PROMPTS, GREEDY)
    assert engine.stats().num_failed_steps == 0
    return tokens


@pytest.fixture(scope="module")
def expected(runner: ModelRunner) -> list[list[int]]:
    runner.generation = -1
    return generate(engine_over(Padded(LocalRanks(runner)))[0], PROMPTS, GREEDY)


def test_all_shapes_share_what_the_largest_needs(runner: ModelRunner, expected: list[list[int]]) -> None:
    device, rows = StandingDevice(ENOUGH), sum(BUCKETS.values())
    graphs = stand_in(runner, device, GraphRoom(16 * ROW_BYTES + rows * KEPT_BYTES))
    assert served(runner, graphs) == expected
    assert graphs.num_graphs == len(device.tried) == len(BUCKETS)
    assert sum(graph.num_replays for graph in device.graphs) > len(BUCKETS)
    assert graphs.num_bytes == device.pool_bytes
    assert 16 * ROW_BYTES <= device.pool_bytes < 17 * ROW_BYTES


@pytest.mark.parametrize(
    ("total", "room"),
    [
        (ENOUGH, GraphRoom(8 * ROW_BYTES)),
        (9 * ROW_BYTES, GraphRoom(None, ROW_BYTES)),
        (9 * ROW_BYTES, GraphRoom(ENOUGH, ROW_BYTES)),
    ],
    ids=["room", "reserve", "both"],
)
def test_what_finds_no_room_is_launched_and_smaller_shapes_are_not(
    runner: ModelRunner, expected: list[list[int]], total: int, room: GraphRoom, caplog: pytest.LogCaptureFixture
) -> None:
    device = StandingDevice(total)
    graphs = stand_in(runner, device, room)
    with caplog.at_level(logging.WARNING):
        assert served(runner, graphs) == expected
    assert len(device.rehearsed) == len(BUCKETS), "all ranks rehearse all shapes"
    assert len(device.tried) == graphs.num_graphs, "nothing is begun that ends in want of memory"
    assert max(bucket.total_rows for bucket in device.tried) == 8
    assert Bucket(1, 1, device.tried[0].num_slots) in device.tried, "those that gain most"
    assert device.pool_bytes <= 8 * ROW_BYTES
    (line,) = [record.message for record in caplog.records if "operation by operation" in record.message]
    assert "num_requests=4, num_rows=4" in line
    assert "0 shapes have graphs" in line


def test_a_rank_serves_on_when_a_capture_runs_out_of_memory(
    runner: ModelRunner, expected: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    def fails(bucket: Bucket) -> Exception | None:
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate") if bucket.total_rows == 4 else None

    device = StandingDevice(ENOUGH, fails)
    graphs = stand_in(runner, device, GraphRoom())
    with caplog.at_level(logging.WARNING):
        assert served(runner, graphs) == expected
    assert graphs.num_graphs == 3
    assert [bucket.total_rows for bucket in device.tried] == [16, 8, 8, 4], "and none after that"
    assert "CUDA out of memory. Tried to allocate; 3 shapes have graphs" in caplog.text
    # Made anew, they stop at what there was
    most = device.pool_bytes
    graphs.clear()
    device.tried.clear()
    assert served(runner, graphs) == expected
    assert device.pool_bytes <= most
    assert [bucket.total_rows for bucket in device.tried][:3] == [16, 8, 8]


def test_a_model_that_cannot_be_captured_is_no_want_of_memory(runner: ModelRunner, expected: list[list[int]]) -> None:
    device = StandingDevice(ENOUGH, lambda bucket: RuntimeError("operation not permitted when stream is capturing"))
    graphs = stand_in(runner, device, GraphRoom())
    assert served(runner, graphs) == expected
    assert graphs.num_graphs == graphs.num_bytes == 0
    assert len(device.tried) == len(BUCKETS)


def test_what_says_that_memory_is_out() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert not is_out_of_memory(RuntimeError("an illegal memory access was encountered"))
    outer = RuntimeError("invalidated")
    outer.__context__ = torch.OutOfMemoryError("")
    assert is_out_of_memory(outer)


@pytest.mark.distributed
def test_ranks_capture_the_same_shapes(checkpoint: Callable[[str], Path], process_ranks: type[ProcessRanks]) -> None:
    """Of two ranks one has room for shapes of four rows, and runs out of memory where it has room."""
    config = config_of(checkpoint("qwen3_moe"), 2, **OPTIONS)
    program = str(Path(__file__).with_name("standing_device.py"))
    found, collectives, graphs = [], [], []
    for command in ((), (sys.executable, program, "4", "1")):
        ranks = process_ranks(config, command)
        try:
            engine, watched = engine_over(Padded(ranks), 2)
            engine.warm_up()
            graphs.append([rank.num_graphs for rank in watched.results[-1].ranks])
            found.append(generate(engine, PROMPTS, GREEDY))
            assert engine.stats().num_failed_steps == 0
        finally:
            ranks.close()
        collectives.append(
            [(rank.num_collectives, rank.collectives_crc) for step in watched.results for rank in step.ranks]
        )
    assert found[0] == found[1]
    assert collectives[0] == collectives[1]
    # Those of four rows, for which both have memory, and none behind the two that one has not
    assert graphs == [[0, 0], [1, 1]]


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_runs_out_of_memory_in_a_capture_serves_on(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = ModelRunner(
        model=str(checkpoint("qwen3_moe")), device="cuda", block_size=BLOCK, max_model_len=64, kv_cache_bytes=1 << 20
    )
    runner.step(prompts())
    plan = RankPlan(0, 1, requests=STEPS["mixed"])
    expected, run = runner.step(plan).token_ids, StaticStep.run

    def run_out(step: StaticStep) -> None:
        run(step)
        if torch.cuda.is_current_stream_capturing():
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    with monkeypatch.context() as patch:
        patch.setattr(StaticStep, "run", run_out)
        for _ in range(2):
            assert runner.step(padded(plan, runner)).token_ids == expected
    assert runner.padded.graphs.num_graphs == 0
    assert runner.step(padded(replace(plan, requests=STEPS["one"]), runner)).token_ids
    assert runner.padded.graphs.num_graphs == 0, "no other is tried"
    runner.padded.graphs = StepGraphs(runner.padded.step_of, CudaCapturer(runner.device), GraphRoom())
    for _ in range(2):
        assert runner.step(padded(plan, runner)).token_ids == expected
    assert runner.padded.graphs.num_graphs == 1
    assert runner.padded.graphs.num_bytes > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_write_to_no_memory_but_their_own(checkpoint: Callable[[str], Path]) -> None:
    """What cuBLAS works in is let go, as torch's own graphs do, and everything that is free is another's then."""
    runner = ModelRunner(
        model=str(checkpoint("qwen3_moe")), device="cuda", block_size=BLOCK, max_model_len=64, kv_cache_bytes=1 << 20
    )
    runner.step(prompts())
    plans = [padded(RankPlan(0, 1, requests=STEPS[step]), runner) for step in ("mixed", "one", "plain")]
    expected = [runner.step(plan).token_ids for plan in plans]
    assert runner.padded.graphs.num_graphs == len(plans)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    others = [torch.full((size,), 0x5A, dtype=torch.uint8, device="cuda") for size in [1 << 20] * 64 + [40 << 20] * 4]
    # Replayed alone: a step that is launched works in memory that is new by then
    for plan, tokens in zip(plans, expected, strict=True):
        assert runner.step(plan).token_ids == tokens
    assert all(bool((other == 0x5A).all()) for other in others)
