"""Experts on their way between ranks: bit for bit, whatever their weights look like, and switched together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from penstock.router.placement import Placement, PlacementVersion
from penstock.workers import experts, packed_weights
from penstock.workers.expert_mover import ExpertMover
from penstock.workers.experts import ExpertShard
from penstock.workers.rebalance_plan import RebalancePlan, Transfer
from penstock.workers.slotted_experts import SlottedExperts

from .test_experts import E, K, modules, rows

R = 2
BEFORE = Placement(E, R, (((0,), (0,), (0,), (1,), (1,), (1,)),) * 2)
CHANGES = {1: {1: (1,), 4: (0,)}}


@pytest.fixture(params=["float32", "tiled", "fbgemm", "slots"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How weights lie: as they are, packed for one kernel or the other, or in slots, as Triton's kernels read them.

    What is left is poisoned there.
    """
    monkeypatch.setattr(packed_weights, "_SMALLEST_PACKED", 1)
    with ExitStack() as stack:
        if request.param == "fbgemm":
            monkeypatch.setattr(packed_weights, "kernel", lambda: None)
        if request.param == "slots":
            from .triton_device import DEVICE

            if DEVICE.type == "cuda":
                pytest.skip("kernels run there, not in the interpreter")
            from penstock.kernels.device import triton_on

            from .replaying_rank import poisoned_leftovers

            monkeypatch.setattr(experts, "runs_kernels", lambda device: True)
            stack.enter_context(triton_on("cpu"))
            stack.enter_context(poisoned_leftovers())
        yield str(request.param)


class Wires:
    """What all ranks send in one step, delivered when the last has begun."""

    def __init__(self) -> None:
        self.sent: dict[int, list[torch.Tensor]] = {}

    def exchange_of(self, rank: int) -> Callable[..., tuple[torch.Tensor, Any]]:
        def exchange(message: torch.Tensor, sent: list[int], received: list[int]) -> tuple[torch.Tensor, Any]:
            self.sent[rank] = list(message.split(sent))
            inbox = torch.zeros(sum(received), dtype=torch.uint8)
            return inbox, _Work(self, rank, inbox, received)

        return exchange


class _Work:
    def __init__(self, wires: Wires, rank: int, inbox: torch.Tensor, received: list[int]) -> None:
        self.wires, self.rank, self.inbox, self.received = wires, rank, inbox, received

    def wait(self) -> None:
        arrived = [self.wires.sent[source][self.rank] for source in range(R)]
        assert [len(part) for part in arrived] == self.received
        self.inbox.copy_(torch.cat(arrived))


def cut(module: Any, numbers: list[int]) -> ExpertShard:
    part = copy.deepcopy(module)
    for name, parameter in list(part.named_parameters(recurse=False)):
        setattr(part, name, torch.nn.Parameter(parameter[numbers].clone(), requires_grad=False))
    part.num_experts = len(numbers)
    return ExpertShard(part, moves=True)


class Gang:
    """Two ranks with their ``shards``, each of two layers."""

    def __init__(self, shards: list[list[ExpertShard]], before: Placement, room_bytes: int = 1) -> None:
        self.shards = shards
        self.movers = [ExpertMover(self.shards[rank], before, rank, room_bytes) for rank in range(R)]
        self.size = self.shards[0][0].bytes_per_expert

    @classmethod
    def of(cls, module: Any, room_bytes: int = 1, before: Placement = BEFORE) -> Gang:
        """Return two ranks whose layers have the same experts."""
        shards = [[cut(module, before.experts_of(layer, rank)) for layer in range(2)] for rank in range(R)]
        return cls(shards, before, room_bytes)

    def addresses(self, rank: int, layer: int) -> set[int]:
        """Return where a layer's experts lie."""
        shard = self.shards[rank][layer]
        return {tensor.data_ptr() for expert in range(shard.num_experts) for tensor in shard.tensors(expert)}

    def step(self, plan: RebalancePlan, ranks: range = range(R)) -> None:
        wires = Wires()
        for rank in ranks:
            self.movers[rank].switch(plan.version, plan.changes)
            self.movers[rank].start(plan, wires.exchange_of(rank))
        for rank in ranks:
            self.movers[rank].finish()

    def send(self, transfers: list[tuple[int, int, int]], layer: int = 1, number: int = 1, chunk: int = 37) -> None:
        """Send (expert, source, target) whole, in steps of ``chunk`` bytes each."""
        for start in range(0, self.size, chunk):
            stop = min(start + chunk, self.size)
            parts = [Transfer(layer, *transfer, start, stop) for transfer in transfers]
            self.step(RebalancePlan(self.movers[0].present.number, staging=number, transfers=parts))

    def compute(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, each computing what it holds of the experts that rank 0's rows choose."""
        placement = self.movers[0].present.placement
        assert all(mover.present.placement == placement for mover in self.movers)
        total = torch.zeros_like(hidden)
        for rank in range(R):
            shard = self.shards[rank][layer]
            mine = placement.owner_table(layer, 0)[ids] == rank
            local = torch.where(mine, placement.local_ids(layer, 0)[ids], shard.num_experts)
            total += shard.run(hidden, local, weights)[0]
        return total


def each_module(kind: str) -> Iterator[Any]:
    dtype = torch.float32 if kind in ("float32", "slots") else torch.bfloat16
    chosen = modules(dtype)
    # Plain, and with biases, transposed
    yield from (chosen[0], chosen[3])


@torch.inference_mode()
def test_moved_experts_compute_what_they_did(kind: str) -> None:
    hidden, ids, weights = rows(17, torch.float32)
    for module in each_module(kind):
        gang = Gang.of(module)
        addresses = gang.addresses(0, 1)
        expected = gang.compute(0, hidden, ids, weights)
        before = [tensor.clone() for tensor in gang.shards[0][1].tensors(1)]
        gang.send([(1, 0, 1), (4, 1, 0)])
        assert torch.equal(gang.compute(1, hidden, ids, weights), expected), "nothing is switched yet"
        gang.step(RebalancePlan(1, CHANGES))
        assert gang.movers[0].present.number == 1
        assert gang.movers[0].present.placement.experts_of(1, 0) == [0, 2, 4]
        for one, other in zip(before, gang.shards[1][1].tensors(0), strict=True):
            assert torch.equal(one, other)
        torch.testing.assert_close(gang.compute(1, hidden, ids, weights), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(gang.compute(0, hidden, ids, weights), expected), "the other layer is as it was"
        # And back, into the memory that the switch has freed
        gang.send([(4, 0, 1), (1, 1, 0)], number=2, chunk=gang.size)
        gang.step(RebalancePlan(2, {1: {1: (0,), 4: (1,)}}))
        assert torch.equal(gang.compute(1, hidden, ids, weights), expected)
        if kind == "slots":
            assert gang.addresses(0, 1) == addresses


@torch.inference_mode()
def test_a_copy_takes_the_place_of_another(kind: str) -> None:
    hidden, ids, weights = rows(17, torch.float32)
    module = next(each_module(kind))
    gang = Gang.of(module, before=Placement(E, R, (((0,), (0,), (0, 1), (1,), (1,), (1,)),) * 2))
    expected = gang.compute(1, hidden, ids, weights)
    gang.send([(0, 0, 1)])
    gang.step(RebalancePlan(1, {1: {0: (0, 1), 2: (0,)}}))
    assert gang.movers[1].present.placement.experts_of(1, 1) == [0, 3, 4, 5]
    assert torch.equal(gang.compute(1, hidden, ids, weights), expected), "rank 0's rows stay at home"
    home, there = gang.shards[0][1], gang.shards[1][1]
    first = torch.zeros_like(ids[:, :1])
    assert torch.equal(home.run(hidden, first, weights[:, :1])[0], there.run(hidden, first, weights[:, :1])[0])


@torch.inference_mode()
def test_memory_for_experts_on_their_way_is_used_again() -> None:
    gang = Gang.of(next(each_module("float32")))
    held = set()
    for number in range(1, 9):
        there = number % 2
        gang.send([(1, 1 - there, there), (4, there, 1 - there)], number=number, chunk=1 << 20)
        gang.step(RebalancePlan(number, {1: {1: (there,), 4: (1 - there,)}}))
        held |= {tensor.data_ptr() for shard in gang.shards[0] for e in range(3) for tensor in shard.tensors(e)}
    # Two layers of three experts and room for one, of two tensors each
    assert len(held) <= 2 * 7


@torch.inference_mode()
def test_ranks_that_meet_again_agree_whether_a_switch_reached_them_or_not() -> None:
    hidden, ids, weights = rows(17, torch.float32)
    gang = Gang.of(next(each_module("float32")))
    expected = gang.compute(1, hidden, ids, weights)
    gang.send([(1, 0, 1), (4, 1, 0)])
    after = BEFORE.moved(CHANGES)
    gang.movers[0].switch(1, CHANGES)  # and rank 1 has not heard of it
    for mover in gang.movers:
        assert mover.settle(PlacementVersion(1, after)) == ([] if mover is gang.movers[0] else [1])
    torch.testing.assert_close(gang.compute(1, hidden, ids, weights), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_what_is_given_up_on_its_way_leaves_no_trace() -> None:
    hidden, ids, weights = rows(17, torch.float32)
    gang = Gang.of(next(each_module("float32")))
    expected = gang.compute(1, hidden, ids, weights)
    half = gang.size // 2
    gang.step(RebalancePlan(0, staging=1, transfers=[Transfer(1, 1, 0, 1, 0, half), Transfer(1, 5, 1, 0, 0, half)]))
    for mover in gang.movers:
        assert mover.settle(PlacementVersion(0, BEFORE)) == []
    assert torch.equal(gang.compute(1, hidden, ids, weights), expected)
    with pytest.raises(KeyError):  # a switch without its experts is a mistake, not a wrong answer
        gang.movers[1].switch(1, CHANGES)
    gang.send([(1, 0, 1), (4, 1, 0)], number=3)
    gang.step(RebalancePlan(3, CHANGES))
    torch.testing.assert_close(gang.compute(1, hidden, ids, weights), expected, rtol=1e-5, atol=1e-5)


def test_room_is_made_for_what_may_arrive_at_once() -> None:
    module = next(each_module("float32"))
    size = cut(module, [0]).bytes_per_expert
    for room_bytes, number in ((1, 1), (3 * size, 3), (3 * size - 1, 2)):
        (rooms,) = Gang.of(module, room_bytes).movers[0]._rooms.values()
        assert len(rooms) == number
    assert K < E


@torch.inference_mode()
def test_what_stays_keeps_its_slot_and_what_comes_is_copied_once() -> None:
    slotted = pytest.importorskip("penstock.kernels.expert_weights").ExpertWeights
    parts = [torch.arange(4.0)[:, None, None].repeat(1, 3, 2), torch.arange(4.0)[:, None, None].repeat(1, 2, 3)]
    held = SlottedExperts(*(slotted.plain(part) for part in parts), moves=True)
    table, (first, second) = held.slots, (tuple(part[0] + number for part in parts) for number in (7, 9))
    # 0 and 2 go; 3 comes before 1, and others before and behind both
    assert held.hold([first, 3, 1, second]) == [first, second]
    assert [[float(tensor.mean()) for tensor in held.tensors(expert)] for expert in range(4)] == [
        [7, 7], [3, 3], [1, 1], [9, 9]
    ]  # fmt: skip
    assert held.slots is table
    assert table.tolist() == [0, 3, 1, 2]
    assert [part[:, 0, 0].tolist() for part in parts] == [[7, 1, 9, 3]] * 2
    # All change their numbers, and nothing is copied
    before = [part.clone() for part in parts]
    assert held.hold([3, 2, 1, 0]) == []
    assert all(torch.equal(part, same) for part, same in zip(parts, before, strict=True))
    assert [float(held.tensors(expert)[0].mean()) for expert in range(4)] == [9, 1, 3, 7]
    with pytest.raises(AssertionError):
        held.hold([0, 1, 2])
    with pytest.raises(AssertionError):
        SlottedExperts(*(slotted.plain(part) for part in parts), moves=False).hold([0, 1, 2, 3])
