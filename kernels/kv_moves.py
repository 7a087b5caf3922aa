"""The KV of accepted drafts moved next to the committed tokens, in all layers by one launch.

Shapes: P pools of a rank (keys and values of every layer), R requests, D rows of a request at most, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_WORDS = 256
"""Of four bytes, that a program moves at a time."""


@dataclass(frozen=True, slots=True)
class Pools:
    """Where a rank's KV lies; it must stay there."""

    places: torch.Tensor
    """[P, 2] int64: each pool's address, and the words of four bytes of one token."""

    @classmethod
    def of(cls, pools: Sequence[torch.Tensor]) -> Pools:
        """Return where ``pools`` [slots, ..] lie, which are contiguous and of whole words."""
        assert all(pool.is_contiguous() and pool[0].nbytes % 4 == 0 for pool in pools), "tokens are runs of words"
        places = [(pool.data_ptr(), pool[0].nbytes // 4) for pool in pools]
        return cls(torch.tensor(places, dtype=torch.int64).to(pools[0].device))


@dataclass(frozen=True, slots=True)
class AcceptedRows:
    """Which rows of a step become context; all int64."""

    path: torch.Tensor
    """[R, D] the rows that yielded tokens, counted within their request, ascending."""
    num_rows: torch.Tensor
    """[R] how many there are; the first is in its place."""
    committed: torch.Tensor
    """[R] tokens before the step."""
    tables: torch.Tensor
    """[R, B] KV blocks."""
    block_size: int


def move_accepted(pools: Pools, accepted: AcceptedRows) -> None:
    """Move the KV of each path's rows to the slots that follow the slot of its first."""
    num_requests, most_rows = accepted.path.shape
    _move[(len(pools.places), num_requests)](
        pools.places,
        accepted.path,
        accepted.num_rows,
        accepted.committed,
        accepted.tables,
        most_rows,
        accepted.tables.shape[1],
        accepted.block_size,
        WORDS=_WORDS,
        num_warps=4,
    )


def move_accepted_reference(pools: Sequence[torch.Tensor], accepted: AcceptedRows) -> None:
    """Do the same on the host, in ``pools`` [slots, ..]."""

    def slot(request: int, place: int) -> int:
        block = int(accepted.tables[request, place // accepted.block_size])
        return block * accepted.block_size + place % accepted.block_size

    for request, committed in enumerate(accepted.committed.tolist()):
        path = accepted.path[request, : int(accepted.num_rows[request])].tolist()
        for step, row in enumerate(path):
            for pool in pools:
                pool[slot(request, committed + path[0] + step)] = pool[slot(request, committed + row)]


@triton.jit
def _slot(tables, place, block_size):
    return tl.load(tables + place // block_size) * block_size + place % block_size


@triton.jit
def _move(
    places, path, num_rows, committed, tables, most_rows, num_blocks, block_size, WORDS: tl.constexpr
):  # fmt: skip
    pool, request = tl.program_id(0), tl.program_id(1)
    words = tl.load(places + 2 * pool).to(tl.pointer_type(tl.int32))
    size = tl.load(places + 2 * pool + 1)
    path += request * most_rows
    tables += request * num_blocks
    start = tl.load(committed + request)
    count = tl.load(num_rows + request)
    first = tl.load(path)
    # Rows are taken from behind where any before them were put, so that none is lost
    for step in range(1, count):
        row = tl.load(path + step)
        if row != first + step:
            source = _slot(tables, start + row, block_size) * size
            target = _slot(tables, start + first + step, block_size) * size
            for part in range(0, size, WORDS):
                at = part + tl.arange(0, WORDS)
                moved = tl.load(words + source + at, mask=at < size)
                tl.store(words + target + at, moved, mask=at < size)
