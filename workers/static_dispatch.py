"""Rows between ranks in a step whose shapes depend on nothing: every rank could send all its rows to every other.

A captured graph cannot wait to be told how many rows go where, so each pair of ranks exchanges room for all of them. No
row is ever dropped, and a step costs two collectives a layer instead of three; bytes on the wire are those of the room.

Shapes: T rows of each rank, R ranks, H hidden, K experts per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.device import has_triton
from .dispatch import AllToAllDispatcher, Received


@dataclass(frozen=True, slots=True)
class _Packed(Received):
    """Rows that kernels packed."""

    places: torch.Tensor
    """[T, R]: which of a rank's rows each row was."""


class StaticAllToAll(AllToAllDispatcher):
    """The exact exchange in equal parts: all ranks run T rows, padding among them. The same sums, to the bit.

    Kernels lay rows out and add their sums where the device has them, torch's operations elsewhere.
    """

    def dispatch(self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> Received:
        """Exchange room for all rows; a row that has no expert on a rank has none there."""
        if has_triton(hidden.device):
            return self._dispatch_packed(layer, hidden, expert_ids, weights)
        num_rows = len(hidden)
        ranks = torch.arange(self.num_ranks, device=hidden.device)[:, None]
        mine = self.owner[layer][expert_ids] == ranks[..., None]  # [R, T, K]
        is_sent = mine.any(dim=-1) & (ranks != self.rank)
        local = torch.where(mine, self.local_ids[layer][expert_ids], self.num_local[layer][:, None, None])
        shared = torch.cat([_bytes(hidden), _bytes(weights.float())], dim=1).expand(self.num_ranks, num_rows, -1)
        message = torch.cat([shared, _bytes(local.to(torch.int32))], dim=2)
        rows = self._exchange(message.contiguous(), "rows").view(self.num_ranks * num_rows, -1)
        weights_end = self.hidden_bytes + weights.shape[1] * 4
        return Received(
            hidden=_numbers(rows[:, : self.hidden_bytes], hidden.dtype),
            expert_ids=_numbers(rows[:, weights_end:], torch.int32).long(),
            weights=_numbers(rows[:, self.hidden_bytes : weights_end], torch.float32),
            sent_rows=expert_ids.new_empty(0),
            sent_counts=[num_rows] * self.num_ranks,
            received_counts=[num_rows] * self.num_ranks,
            rows_sent=is_sent.sum(),
            wire_bytes=self._wire_bytes(num_rows),
        )

    def _dispatch_packed(
        self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> Received:
        from ..kernels.rank_packing import RowsOfRanks, pack_for_ranks, unpack_from_ranks

        num_rows, num_local = len(hidden), self.num_local[layer]
        tables = self.owner[layer], self.local_ids[layer], num_local
        packed = pack_for_ranks(hidden, expert_ids, weights, *tables, self.rank)
        inbox = self._exchange(packed.rows.message, "rows")
        rows = unpack_from_ranks(RowsOfRanks.of(inbox, hidden.dtype, weights.shape[1]), num_local, self.rank)
        return _Packed(
            hidden=rows.hidden,
            expert_ids=rows.expert_ids,
            weights=rows.weights,
            sent_rows=expert_ids.new_empty(0),
            sent_counts=[num_rows] * self.num_ranks,
            received_counts=[num_rows] * self.num_ranks,
            rows_sent=packed.sent,
            wire_bytes=self._wire_bytes(num_rows),
            places=packed.places,
        )

    def combine(self, partial: torch.Tensor, received: Received, num_rows: int) -> torch.Tensor:
        """Return partial sums to their rows; ranks are added in rank order."""
        returned = self._exchange(partial.contiguous(), "sums").view(self.num_ranks, num_rows, -1)
        if isinstance(received, _Packed):
            from ..kernels.rank_packing import add_from_ranks

            return add_from_ranks(returned, received.places)
        parts = returned.float()
        output = parts[0].clone()
        for part in parts[1:]:
            output += part
        return output.to(partial.dtype)

    def _exchange(self, message: torch.Tensor, name: str) -> torch.Tensor:
        """Return what all ranks sent, in equal parts, as ``message`` is."""
        inbox = torch.empty_like(message)
        self.log.add(name)
        self.collectives.all_to_all(inbox, message)
        return inbox

    def _wire_bytes(self, num_rows: int) -> int:
        score_bytes, self._score_bytes = self._score_bytes, 0
        return (self.num_ranks - 1) * num_rows * (self.row_bytes + self.hidden_bytes) + score_bytes


def _bytes(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.contiguous().view(torch.uint8)


def _numbers(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return raw.contiguous().view(dtype)
