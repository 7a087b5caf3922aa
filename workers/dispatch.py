"""Move rows to the ranks that own their experts, and their partial sums back.

Shapes: T rows of this rank, S (row, rank) pairs it sends, V rows it receives, H hidden, K experts per row, R ranks.
A row goes to a rank once, however many of its experts live there.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from ..router.placement import Placement
from .collectives import Collectives


@dataclass(frozen=True, slots=True)
class Received:
    """Rows that reached a rank, and what it takes to send their results back."""

    hidden: torch.Tensor
    """[V, H]"""
    expert_ids: torch.Tensor
    """[V, K] local ids; the number of local experts for "none"."""
    weights: torch.Tensor
    """[V, K] f32"""
    sent_rows: torch.Tensor
    """[S] row of this rank behind each pair sent, grouped by rank."""
    sent_counts: list[int]
    """[R] pairs sent to each rank."""
    received_counts: list[int]
    """[R] rows received from each rank."""
    rows_sent: int | torch.Tensor
    """Pairs sent to other ranks; where the host is not to know, on the device: [], or [R] of each."""
    wire_bytes: int
    """All bytes this rank sends to others for this dispatch and its combine."""


class Dispatcher(Protocol):
    """Dispatch and combine of one rank; all ranks call both in the same order."""

    payload_bytes_per_row: int

    def dispatch(self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> Received:
        """Send rows [T, H] with global ``expert_ids`` [T, K] (E for "none") to the owners of that layer's experts."""
        ...

    def combine(self, partial: torch.Tensor, received: Received, num_rows: int) -> torch.Tensor:
        """Return [T, H]: for each row, the sum of the owners' partial sums [V, H]."""
        ...

    def sum_scores(self, scores: torch.Tensor) -> None:
        """Sum ``scores`` of experts over all ranks, in place."""
        ...

    def agree(self, answer: bool) -> bool:
        """Return whether all ranks answer yes, which waits for them; no part of a step."""
        ...


class LocalDispatcher:
    """One rank that owns every expert: nothing moves."""

    payload_bytes_per_row = 0

    def dispatch(self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> Received:
        """Return the rows themselves."""
        return Received(hidden, expert_ids, weights, expert_ids.new_empty(0), [0], [0], 0, 0)

    def combine(self, partial: torch.Tensor, received: Received, num_rows: int) -> torch.Tensor:
        """Return the sums themselves."""
        return partial

    def sum_scores(self, scores: torch.Tensor) -> None:
        """Leave them as they are."""

    def agree(self, answer: bool) -> bool:
        """Return this rank's."""
        return answer


class CollectiveLog:
    """What a rank asked of its process group in this step; ranks whose logs differ would deadlock or mix data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a step."""
        self.num_collectives, self.crc = 0, 0

    def add(self, name: str) -> None:
        """Record one collective by what it carries."""
        self.num_collectives += 1
        self.crc = zlib.crc32(name.encode(), self.crc)


def both_crcs(before: int, after: int) -> int:
    """Return a checksum of two runs of collectives by theirs; ``after`` where nothing came before."""
    return zlib.crc32(after.to_bytes(4), before) if before else after


class AllToAllDispatcher:
    """Exact all-to-all over a process group (gloo, NCCL): counts, then rows, then sums; three collectives a layer.

    A row's hidden state, local expert ids and weights travel as one message of bytes.
    """

    def __init__(
        self,
        placement: Placement,
        rank: int,
        collectives: Collectives,
        log: CollectiveLog,
        device: torch.device,
        hidden_bytes: int,
        top_k: int,
    ) -> None:
        self.rank, self.num_ranks, self.collectives, self.log = rank, placement.num_ranks, collectives, log
        shape = placement.num_layers, placement.num_experts + 1
        self.owner = torch.empty(shape, dtype=torch.int64, device=device)  # [L, E + 1]
        self.local_ids = torch.empty_like(self.owner)
        layers, ranks = range(placement.num_layers), range(placement.num_ranks)
        num_local = [[len(placement.experts_of(layer, number)) for number in ranks] for layer in layers]
        self.num_local = torch.tensor(num_local, device=device)  # [L, R]
        self.relocate(placement, layers)
        self.payload_bytes_per_row = 2 * hidden_bytes
        self.row_bytes = hidden_bytes + top_k * 8
        self.hidden_bytes = hidden_bytes
        self._score_bytes = 0
        """Sent for a budget's scores since the last dispatch."""

    def relocate(self, placement: Placement, layers: Iterable[int]) -> None:
        """Send rows where ``placement`` has the experts of ``layers``; every rank holds as many as it did."""
        for layer in layers:
            self.owner[layer] = placement.owner_table(layer, self.rank)
            self.local_ids[layer] = placement.local_ids(layer, self.rank)

    def exchange(
        self, message: torch.Tensor, sent_counts: list[int], received_counts: list[int]
    ) -> tuple[torch.Tensor, dist.Work]:
        """Begin to send so many bytes of ``message`` to each rank; return where theirs arrive, and what waits for it.

        One collective, beside those that come before it is awaited; see `Collectives.begin_all_to_all`.
        """
        self.log.add("experts")
        return self.collectives.begin_all_to_all(message, received_counts, sent_counts)

    def dispatch(self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> Received:
        """Exchange counts, then rows."""
        owners = self.owner[layer][expert_ids]  # [T, K]
        ranks = torch.arange(self.num_ranks, device=hidden.device)
        visits = (owners[:, None, :] == ranks[None, :, None]).any(dim=-1)  # [T, R]
        to_rank, sent_rows = visits.t().nonzero(as_tuple=True)  # grouped by rank, rows ascending
        counts = visits.sum(dim=0)
        received_counts_t = torch.empty_like(counts)
        self.log.add("counts")
        self.collectives.all_to_all(received_counts_t, counts)
        sent_counts, received_counts = counts.tolist(), received_counts_t.tolist()

        mine = owners[sent_rows] == to_rank[:, None]  # [S, K]
        local = torch.where(mine, self.local_ids[layer][expert_ids[sent_rows]], self.num_local[layer][to_rank][:, None])
        message = torch.cat(
            [
                hidden[sent_rows].contiguous().view(torch.uint8),
                local.to(torch.int32).view(torch.uint8),
                weights[sent_rows].to(torch.float32).contiguous().view(torch.uint8),
            ],
            dim=1,
        )
        inbox = message.new_empty(sum(received_counts), self.row_bytes)
        self.log.add("rows")
        self.collectives.all_to_all(inbox, message, received_counts, sent_counts)
        rows_out = sum(sent_counts) - sent_counts[self.rank]
        sums_out = sum(received_counts) - received_counts[self.rank]
        score_bytes, self._score_bytes = self._score_bytes, 0
        ids_end = self.hidden_bytes + (self.row_bytes - self.hidden_bytes) // 2
        return Received(
            hidden=inbox[:, : self.hidden_bytes].contiguous().view(hidden.dtype),
            expert_ids=inbox[:, self.hidden_bytes : ids_end].contiguous().view(torch.int32).long(),
            weights=inbox[:, ids_end:].contiguous().view(torch.float32),
            sent_rows=sent_rows,
            sent_counts=sent_counts,
            received_counts=received_counts,
            rows_sent=rows_out,
            # one int64 count to every other rank, rows out, other ranks' sums back, and a budget's scores
            wire_bytes=8 * (self.num_ranks - 1)
            + rows_out * self.row_bytes
            + sums_out * self.hidden_bytes
            + score_bytes,
        )

    def combine(self, partial: torch.Tensor, received: Received, num_rows: int) -> torch.Tensor:
        """Return partial sums to their rows; ranks are added in rank order."""
        returned = partial.new_empty(len(received.sent_rows), partial.shape[-1])
        self.log.add("sums")
        self.collectives.all_to_all(returned, partial.contiguous(), received.sent_counts, received.received_counts)
        output = torch.zeros(num_rows, partial.shape[-1], dtype=torch.float32, device=partial.device)
        output.index_add_(0, received.sent_rows, returned.float())
        return output.to(partial.dtype)

    def sum_scores(self, scores: torch.Tensor) -> None:
        """Sum ``scores`` over all ranks; one collective."""
        self.log.add("scores")
        self.collectives.all_reduce(scores)
        # As a ring sends it
        self._score_bytes += 2 * (self.num_ranks - 1) * scores.nbytes // self.num_ranks

    def agree(self, answer: bool) -> bool:
        """Count those who say no; one collective."""
        against = torch.tensor([not answer], dtype=torch.int32, device=self.owner.device)
        self.collectives.all_reduce(against)
        return int(against) == 0
