"""A rank's part in a rebalance: hand experts to other ranks beside the layers' work, take theirs, and switch.

What arrives goes to memory of its own; a step's plan says when it takes the place of other experts. The memory that is
free then, of the ones or the others (`ExpertShard.hold`), is for the next to arrive. So a rank needs room for the
experts of one transfer and no more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..router.placement import Placement, PlacementVersion
from .experts import ExpertShard, Tensors
from .rebalance_plan import RebalancePlan, Transfer

Exchange = Callable[[torch.Tensor, list[int], list[int]], tuple[torch.Tensor, dist.Work]]
"""Sends bytes, so many to each rank, and says where as many of each will be once the work is done."""
_Key = tuple[int, int]
"""Layer and expert."""
_Layout = tuple[tuple[torch.Size, torch.dtype], ...]


@dataclass(slots=True)
class _Pending:
    """What is on its way in this step."""

    work: dist.Work
    inbox: torch.Tensor
    transfers: list[Transfer]
    """That this rank receives, in the order in which they lie in ``inbox``."""


class ExpertMover:
    """Knows the present placement of all ``shards``, a rank's layers in their order, and what is to come of it.

    ``room_bytes``: how many bytes may arrive for one switch; as many experts get memory at once, one at least.
    """

    def __init__(self, shards: Sequence[ExpertShard], placement: Placement, rank: int, room_bytes: int) -> None:
        self._shards, self._rank = shards, rank
        self.present = PlacementVersion(0, placement)
        self._staging = 0
        self._arrived: dict[_Key, Tensors] = {}
        self._leaving: dict[_Key, Tensors] = {}
        """What this rank is sending: unpacking it may take time."""
        self._rooms: defaultdict[_Layout, list[Tensors]] = defaultdict(list)
        self._pending: _Pending | None = None
        for shard in {_layout(shard.tensors(0)): shard for shard in shards}.values():
            for _ in range(max(1, room_bytes // shard.bytes_per_expert)):
                self._free(shard.room())

    def switch(self, number: int, changes: Mapping[int, Mapping[int, tuple[int, ...]]]) -> list[int]:
        """Make ``changes`` (`RebalancePlan.changes`) if version ``number`` is not the present one; return the layers.

        The experts that this rank gains must have arrived.
        """
        if number == self.present.number:
            return []
        self._leaving.clear()  # another expert may lie there soon
        before = self.present.placement
        after = before.moved(changes)
        for layer in changes:
            old, new = before.experts_of(layer, self._rank), after.experts_of(layer, self._rank)
            if old != new:
                self._hold(layer, old, new)
        self.present = PlacementVersion(number, after)
        return list(changes)

    def settle(self, version: PlacementVersion) -> list[int]:
        """Be at ``version``, and drop what has arrived for a later one; return the layers that change.

        For ranks that meet again: a switch may have reached some of them only.
        """
        before = self.present.placement
        changes = {
            layer: {expert: new[expert] for expert in range(before.num_experts) if new[expert] != old[expert]}
            for layer, (old, new) in enumerate(zip(before.holders, version.placement.holders, strict=True))
            if new != old
        }
        changed = self.switch(version.number, changes)
        self._pending = None
        self._drop()
        return changed

    def start(self, plan: RebalancePlan, exchange: Exchange) -> None:
        """Begin the step's transfers; `finish` waits for them."""
        if plan.staging != self._staging:
            self._drop()
            self._staging = plan.staging
        if not plan.transfers:
            return
        num_ranks = self.present.placement.num_ranks
        sent = sorted((t for t in plan.transfers if t.source == self._rank), key=lambda t: t.target)
        received = sorted((t for t in plan.transfers if t.target == self._rank), key=lambda t: t.source)
        device = self._shards[0].device
        parts = [part for transfer in sent for part in self._bytes_sent(transfer)]
        message = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)
        sizes_out, sizes_in = [0] * num_ranks, [0] * num_ranks
        for transfer in sent:
            sizes_out[transfer.target] += transfer.stop - transfer.start
        for transfer in received:
            sizes_in[transfer.source] += transfer.stop - transfer.start
        inbox, work = exchange(message, sizes_out, sizes_in)
        self._pending = _Pending(work, inbox, received)

    def finish(self) -> None:
        """Wait for what `start` began, and keep what has arrived."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.work.wait()
        place = 0
        for transfer in pending.transfers:
            for part in _window(self._room_of(transfer), transfer.start, transfer.stop):
                part.copy_(pending.inbox[place : place + len(part)])
                place += len(part)

    def _hold(self, layer: int, old: list[int], new: list[int]) -> None:
        number_of = {expert: number for number, expert in enumerate(old)}
        held: list[int | Tensors] = [
            number_of[expert] if expert in number_of else self._arrived.pop((layer, expert)) for expert in new
        ]
        for tensors in self._shards[layer].hold(held):
            self._free(tensors)

    def _bytes_sent(self, transfer: Transfer) -> list[torch.Tensor]:
        key = transfer.layer, transfer.expert
        if key not in self._leaving:
            number = self.present.placement.experts_of(transfer.layer, self._rank).index(transfer.expert)
            self._leaving[key] = self._shards[transfer.layer].tensors(number)
        return list(_window(self._leaving[key], transfer.start, transfer.stop))

    def _room_of(self, transfer: Transfer) -> Tensors:
        key = transfer.layer, transfer.expert
        if key not in self._arrived:
            shard = self._shards[transfer.layer]
            rooms = self._rooms[_layout(shard.tensors(0))]
            self._arrived[key] = rooms.pop() if rooms else shard.room()
        return self._arrived[key]

    def _free(self, tensors: Tensors) -> None:
        self._rooms[_layout(tensors)].append(tensors)

    def _drop(self) -> None:
        self._leaving.clear()
        for tensors in self._arrived.values():
            self._free(tensors)
        self._arrived.clear()


def _layout(tensors: Tensors) -> _Layout:
    return tuple((tensor.shape, tensor.dtype) for tensor in tensors)


def _window(tensors: Tensors, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Yield the bytes ``start`` to ``stop`` of ``tensors``, one behind the other, as views of them."""
    for tensor in tensors:
        if start < tensor.nbytes and stop > 0:
            yield tensor.view(-1).view(torch.uint8)[max(start, 0) : stop]
        start, stop = start - tensor.nbytes, stop - tensor.nbytes
