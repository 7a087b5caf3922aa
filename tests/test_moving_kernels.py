"""Experts that kernels compute move while the sequence of operations that was recorded before serves on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from .triton_device import DEVICE

from penstock.cluster.config import EngineConfig  # isort: skip
from penstock.cluster.engine.engine import Engine
from penstock.kernels.device import triton_on
from penstock.router.expert_budget import ExpertBudget
from penstock.router.placement import PlacementVersion, contiguous
from penstock.workers import experts
from penstock.workers.collectives import Collectives
from penstock.workers.plan import RankPlan, StepPlan, StepResult
from penstock.workers.runner import ModelRunner

from .quantized_checkpoints import fp8_of
from .static_steps import BLOCK, STEPS, padded, prompts
from .tiny_engine import GREEDY, config_of, controller_of, generate

if TYPE_CHECKING:
    from penstock.cluster.transport.process_ranks import ProcessRanks

not_on_a_gpu = pytest.mark.skipif(DEVICE.type == "cuda", reason="there `-m gpu` tests run the kernels as they are")

# --- one rank, beside its own mirror image ----------------------------------------------------------------------------


class Mirror(Collectives):
    """Another rank that sends what it is sent."""

    def _run(self, collective: object, into: torch.Tensor, of: torch.Tensor) -> None:
        into.copy_(of)


def mirrored(directory: Path, device: str) -> ModelRunner:
    """Return rank 0 of two, whose experts may move, with the contexts of all `STEPS` behind it."""
    sizes = {"block_size": BLOCK, "max_model_len": 64, "kv_cache_bytes": 1 << 20, "moved_bytes": 1 << 20}
    runner = ModelRunner(model=str(directory), device=device, num_ranks=2, placement=contiguous(2, 8, 2), **sizes)
    runner.connect(Mirror())
    runner.step(prompts())
    return runner


def assert_a_sequence_serves_both_placements(runner: ModelRunner, budget: str | None) -> None:
    """Run one step three times: as it comes, again, and once an expert has gone and another come."""
    parsed = None if budget is None else ExpertBudget.parse(budget)
    first = None if parsed is None else 0
    requests = [replace(part, first_budgeted_row=first) for part in STEPS["plain"]]
    plan = padded(RankPlan(0, 1, requests=requests, budget=parsed), runner)

    @torch.inference_mode()
    def logits() -> torch.Tensor:
        return runner.padded.run(plan).logits.clone()

    before = logits()
    assert torch.equal(logits(), before)
    steps, shard = dict(runner.padded.graphs._steps), runner.experts.shards[1]
    tables = [runner.layers[1].owner, runner.padded.dispatcher.owner, runner.padded.dispatcher.local_ids]
    addresses = {tensor.data_ptr() for expert in range(4) for tensor in shard.tensors(expert)}
    stays = [tensor.data_ptr() for tensor in shard.tensors(2)]
    left = [tensor.data_ptr() for tensor in shard.tensors(1)]
    # Expert 1 goes, 6 comes: what follows 1 has other numbers than before
    number = runner.mover.present.number + 1
    runner.mover._arrived[1, 6] = tuple(tensor.neg() for tensor in shard.tensors(0))
    placement = runner.placement.moved({1: {1: (1,), 6: (0,)}})
    runner.settle(PlacementVersion(number, placement))
    assert placement.experts_of(1, 0) == [0, 2, 3, 6]
    assert {tensor.data_ptr() for expert in range(4) for tensor in shard.tensors(expert)} == addresses
    assert [tensor.data_ptr() for tensor in shard.tensors(1)] == stays
    assert [tensor.data_ptr() for tensor in shard.tensors(3)] == left
    for table, same in zip(tables, (runner.layers[1].owner, *_tables(runner)), strict=True):
        assert table.data_ptr() == same.data_ptr()
    assert tables[0].tolist() == placement.owner_table(1, 0)[:-1].tolist()
    after = logits()
    assert runner.padded.graphs._steps == steps
    assert not torch.equal(after, before)
    # What is made of the same step where experts are then, and where they lie by their numbers
    runner.experts.shards[1] = without_slots(runner, shard)
    runner.padded.graphs.clear()
    torch.testing.assert_close(logits(), after, rtol=1e-5, atol=1e-5)


def without_slots(runner: ModelRunner, shard: experts.ExpertShard) -> experts.ExpertShard:
    """Return a shard of the same experts, which lie in the order of their numbers and stay."""
    module = next(part for part in runner.model.modules() if getattr(part, "penstock_layer", None) == 1)
    kinds = ("", "_bias") if module.has_bias else ("",)
    names = [name + kind for name in ("gate_up_proj", "down_proj") for kind in kinds]
    for name, *tensors in zip(names, *(shard.tensors(expert) for expert in range(4)), strict=True):
        setattr(module, name, torch.nn.Parameter(torch.stack(tensors), requires_grad=False))
    return experts.ExpertShard(module)


def _tables(runner: ModelRunner) -> tuple[torch.Tensor, torch.Tensor]:
    return runner.padded.dispatcher.owner, runner.padded.dispatcher.local_ids


@not_on_a_gpu
@pytest.mark.parametrize(
    ("model_type", "budget"), [("qwen3_moe", None), ("gpt_oss", None), ("qwen3_moe", "experts=3,rank_balance=0.5")]
)
def test_a_recorded_sequence_serves_both_placements(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, model_type: str, budget: str | None
) -> None:
    from .replaying_rank import poisoned_leftovers, recorded_steps

    monkeypatch.setattr(experts, "runs_kernels", lambda device: True)
    with triton_on("cpu"), poisoned_leftovers(), recorded_steps() as seen:
        runner = mirrored(checkpoint(model_type), "cpu")
        assert_a_sequence_serves_both_placements(runner, budget)
        assert (seen.recorded, seen.replayed) == (2, 2)
        loads = runner.experts.take_loads()
    # Of every run and of the prompts each row's two choices, in each layer
    num_rows = sum(len(request.token_ids) for request in prompts().requests) + 4 * len(STEPS["plain"])
    assert [sum(layer) for layer in loads.chosen] == [2 * num_rows] * 2
    assert loads.computed == [2 * num_rows] * 2, "its own and its mirror image's"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("budget", [None, "experts=3,rank_balance=0.5"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_a_graph_serves_both_placements(checkpoint: Callable[[str], Path], model_type: str, budget: str | None) -> None:
    runner = mirrored(checkpoint(model_type), "cuda")
    assert runner.info.replays_graphs
    runner.experts.take_loads()
    assert_a_sequence_serves_both_placements(runner, budget)
    assert None not in runner.padded.graphs._graphs.values()
    # Runs before a capture do not count
    assert [sum(layer) for layer in runner.experts.take_loads().chosen] == [2 * 4 * len(STEPS["plain"])] * 2


# --- two ranks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def watched_ranks(process_ranks: type[ProcessRanks]) -> type[ProcessRanks]:
    class Watched(process_ranks):
        """Ranks that pad small steps, what they were told and what they said."""

        def __init__(self, config: EngineConfig, report: Path) -> None:
            super().__init__(config, [sys.executable, str(Path(__file__).with_name("replaying_rank.py")), str(report)])
            self.infos = [replace(info, replays_graphs=True) for info in self.infos]
            self.plans: list[StepPlan] = []
            self.results: list[StepResult] = []

        def submit(self, plan: StepPlan) -> None:
            self.plans.append(plan)
            super().submit(plan)

        def collect(self, plan: StepPlan) -> StepResult:
            self.results.append(super().collect(plan))
            return self.results[-1]

    return Watched


@not_on_a_gpu
@pytest.mark.distributed
def test_replayed_steps_go_on_while_experts_move(
    checkpoint: Callable[[str], Path], watched_ranks: type[ProcessRanks], tmp_path: Path
) -> None:
    directory = fp8_of(checkpoint("qwen3_moe"), tmp_path, (8, 16))[0]
    config = config_of(
        directory, 2, enable_eplb=True, num_redundant_experts=2, eplb_window_size=4, eplb_step_interval=4,
        eplb_bytes_per_step=5000, max_num_batched_tokens=24, max_num_seqs=8,
    )  # fmt: skip
    params, texts = replace(GREEDY, max_tokens=12), [[9, 9, 9], [5, 17, 60]]
    report = tmp_path / "said"
    ranks = watched_ranks(config, report)

    def tokens(config: EngineConfig) -> list[list[int]]:
        return generate(Engine(config, ranks, controller=controller_of(0)), texts, params)

    try:
        expected = tokens(replace(config, eplb_step_interval=1 << 30))
        start, before = len(ranks.plans), ranks.placed
        assert tokens(config) == expected
        plans, results = ranks.plans[start:], ranks.results[start:]
    finally:
        ranks.close()
    parts = [plan.ranks[0].rebalance for plan in plans]
    switched = [number for number, part in enumerate(parts) if part.changes]
    assert len(switched) > 1
    assert switched[-1] < len(parts) - 2, "tokens come before, while and after experts move"
    assert ranks.placed.placement != before.placement
    # Moves are one more collective of a step, which is replayed all the same
    numbers: dict[tuple[object, bool], set[tuple[int, int]]] = {}
    for plan, part, result in zip(plans, parts, results, strict=True):
        seen = {(rank.num_collectives, rank.collectives_crc) for rank in result.ranks}
        numbers.setdefault((plan.ranks[0].bucket, bool(part.transfers)), set()).update(seen)
    assert all(len(seen) == 1 for (bucket, _), seen in numbers.items() if bucket is not None)
    moving = {bucket for bucket, moves in numbers if moves and bucket is not None}
    assert moving
    for bucket in moving:
        (with_moves,), (without,) = numbers[bucket, True], numbers[bucket, False]
        assert with_moves[0] == without[0] + 1
        assert with_moves[1] != without[1]
    num_padded = sum(plan.ranks[0].bucket is not None for plan in ranks.plans)
    said = [json.loads(line) for line in report.read_text().splitlines()]
    assert len(said) == 2
    for rank in said:
        assert rank["recorded"] == len({plan.ranks[0].bucket for plan in ranks.plans} - {None})
        assert rank["replayed"] == num_padded - rank["recorded"]
        assert rank["arrived"] > 0
