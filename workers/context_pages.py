"""The KV blocks that the requests of a static step read in place, and what their rows see of them.

All of it is computed on the device from a step's inputs, in shapes that depend on the bucket and the pool alone.

Shapes: R requests, N rows of each, W blocks of a request, P blocks of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn.attention.flex_attention import BlockMask

_MOST_ROWS = 31
"""Of a request: which of its rows one sees are the bits of an int32."""

_QUERY_BLOCK = 1024
"""Rows that share a list of blocks: all that a request has, for each of its heads on a key's head."""


@dataclass(slots=True)
class ContextPages:
    """Each request's context in the pool. A request without rows reads nothing."""

    tables: torch.Tensor
    """[R, W] int64 its KV blocks, in the order of its text."""
    committed: torch.Tensor
    """[R] int64 committed tokens, whose KV comes first."""
    num_rows: torch.Tensor
    """[R] int64 rows that are no padding, whose KV follows."""
    positions: torch.Tensor
    """[R, N] int64 where the rows are in the text."""
    own: torch.Tensor
    """[R, N, N] bool: the rows of its request that a row sees."""
    block_size: int
    num_pool_blocks: int
    most_blocks: int
    """Of any request in any bucket, so that attention is compiled for few shapes; at least W."""
    _places: torch.Tensor | None = None
    _masks: dict[int | None, BlockMask] = field(default_factory=dict)

    def mask(self, window: int | None) -> BlockMask:
        """Return what rows see of the pool under a sliding window of ``window`` tokens, None for all; layers share it.

        Masks of all windows have one shape and one code, and differ in their numbers alone. Blocks that no row's
        window reaches are not read.
        """
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        return self._masks[window]

    def _mask(self, window: int | None) -> BlockMask:
        r, n = self.positions.shape
        assert n <= _MOST_ROWS, "a bucket's requests have few rows"
        block_size, device = self.block_size, self.tables.device
        own, first = self.own, torch.zeros_like(self.positions)
        if window is not None:
            first = (self.positions - window + 1).clamp_min(0)
            own = own & (self.positions[:, :, None] - self.positions[:, None, :] < window)
        seen = (own.int() << torch.arange(n, device=device, dtype=torch.int32)).sum(-1, dtype=torch.int32)
        first_seen, committed, places = first.int(), self.committed.int(), self._places_of_blocks()

        def sees(request: torch.Tensor, head: torch.Tensor, row: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
            place = places[request, slot // block_size] * block_size + slot % block_size
            row_there = place - committed[request]
            is_seen = (seen[request, row] >> row_there.clamp(0, _MOST_ROWS)) & 1
            return torch.where(row_there < 0, place >= first_seen[request, row], is_seen == 1)

        first_block = first.amin(1) // block_size
        wanted = first_block[:, None] + torch.arange(self.most_blocks, device=device)
        blocks = self.tables.gather(1, wanted.clamp_max(self.tables.shape[1] - 1))
        return BlockMask.from_kv_blocks(
            kv_num_blocks=(self._num_blocks() - first_block).int().view(r, 1, 1),
            kv_indices=blocks.int().view(r, 1, 1, self.most_blocks),
            BLOCK_SIZE=(_QUERY_BLOCK, block_size),
            mask_mod=sees,
            seq_lengths=(n, self.num_pool_blocks * block_size),
            compute_q_blocks=False,
        )

    def _num_blocks(self) -> torch.Tensor:
        """Return how many blocks each request's context fills [R]."""
        return (self.committed + self.num_rows + self.block_size - 1) // self.block_size

    def _places_of_blocks(self) -> torch.Tensor:
        """Return which block of a request's text each block of the pool is [R, P] int32, -1 if none."""
        if self._places is None:
            r, w = self.tables.shape
            places = torch.arange(w, device=self.tables.device).expand(r, w)
            is_there = places < self._num_blocks()[:, None]
            nowhere = torch.full((r, self.num_pool_blocks), -1, dtype=torch.int32, device=self.tables.device)
            # The pool's last block is scratch, no request's
            self._places = nowhere.scatter(
                1,
                torch.where(is_there, self.tables, self.num_pool_blocks - 1),
                torch.where(is_there, places, -1).int(),
            )
        return self._places
