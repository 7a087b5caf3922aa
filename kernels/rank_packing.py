"""Rows laid out for the ranks that own their experts, and their sums added up again, with no word from the host.

Dispatch between GPUs in a captured graph sends as many rows to every rank as there are: that is safe whatever rows
choose, and needs no count on the host. A row goes to a rank once, however many of its experts live there.

Shapes: T rows of this rank, H hidden, K experts per row, R ranks, E experts of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_HIDDEN = 512
"""Hidden numbers that a program moves or adds at a time."""
_ROWS = 64
"""Rows that it looks at at a time."""


@dataclass(frozen=True, slots=True)
class PackedForRanks:
    """What each rank is sent; ``places`` is what `add_from_ranks` needs."""

    hidden: torch.Tensor
    """[R, T, H]; what lies behind the first ``counts`` rows is not written."""
    expert_ids: torch.Tensor
    """[R, T, K] int32 ids local to the rank; its number of experts for "none", as in all rows behind its last."""
    weights: torch.Tensor
    """[R, T, K] f32; 0 for "none"."""
    counts: torch.Tensor
    """[R] int32 rows for each rank."""
    places: torch.Tensor
    """[T, R] int32: which of a rank's rows each row is; -1 where it does not go."""


def pack_for_ranks(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    owner: torch.Tensor,
    local_ids: torch.Tensor,
    num_local: torch.Tensor,
) -> PackedForRanks:
    """Lay out rows [T, H] with ``expert_ids`` [T, K] (E for "none") and ``weights`` [T, K], those of a rank ascending.

    ``owner`` and ``local_ids`` [E + 1]: the rank of each expert, R for none, and its id there; ``num_local`` [R]. All
    ids are int64.
    """
    (num_rows, top_k), num_ranks = expert_ids.shape, len(num_local)
    packed = _empty(hidden, top_k, num_ranks)
    if num_rows:
        _pack[(num_ranks, num_rows)](
            hidden.contiguous(),
            expert_ids.contiguous(),
            weights.contiguous(),
            owner,
            local_ids,
            num_local,
            packed.hidden,
            packed.expert_ids,
            packed.weights,
            packed.counts,
            packed.places,
            num_rows,
            num_ranks,
            len(owner) - 1,
            SIZE=hidden.shape[1],
            TOP_K=top_k,
            COLUMNS=triton.next_power_of_2(top_k),
            ROWS=_ROWS,
            BLOCK=_HIDDEN,
            num_warps=4,
        )
    else:
        packed.counts.zero_()
    return packed


def pack_for_ranks_reference(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    owner: torch.Tensor,
    local_ids: torch.Tensor,
    num_local: torch.Tensor,
) -> PackedForRanks:
    """Do the same on the host."""
    packed = _empty(hidden, expert_ids.shape[1], len(num_local))
    packed.expert_ids.copy_(num_local[:, None, None])
    packed.weights.zero_()
    packed.places.fill_(-1)
    for rank in range(len(num_local)):
        mine = owner[expert_ids] == rank
        rows = mine.any(dim=1).nonzero()[:, 0]
        packed.counts[rank] = len(rows)
        packed.places[rows, rank] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        packed.hidden[rank, : len(rows)] = hidden[rows]
        ids = torch.where(mine, local_ids[expert_ids], num_local[rank])
        packed.expert_ids[rank, : len(rows)] = ids[rows].int()
        packed.weights[rank, : len(rows)] = torch.where(mine, weights, 0)[rows].float()
    return packed


def add_from_ranks(returned: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return each row's sum [T, H] of what ranks ``returned`` [R, T, H], added in f32 in the order of ranks."""
    num_ranks, num_rows, size = returned.shape
    output = returned.new_empty(num_rows, size)
    if num_rows:
        _add[(num_rows, triton.cdiv(size, _HIDDEN))](
            returned.contiguous(), places, output, num_rows, SIZE=size, RANKS=num_ranks, BLOCK=_HIDDEN, num_warps=4
        )
    return output


def add_from_ranks_reference(returned: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Do the same on the host."""
    sums = torch.zeros(returned.shape[1:], device=returned.device)
    for rank, from_rank in enumerate(returned):
        rows = (places[:, rank] >= 0).nonzero()[:, 0]
        sums[rows] += from_rank[places[rows, rank].long()].float()
    return sums.to(returned.dtype)


def _empty(hidden: torch.Tensor, top_k: int, num_ranks: int) -> PackedForRanks:
    num_rows, device = len(hidden), hidden.device
    return PackedForRanks(
        hidden.new_empty(num_ranks, num_rows, hidden.shape[1]),
        torch.empty(num_ranks, num_rows, top_k, dtype=torch.int32, device=device),
        torch.empty(num_ranks, num_rows, top_k, dtype=torch.float32, device=device),
        torch.empty(num_ranks, dtype=torch.int32, device=device),
        torch.empty(num_rows, num_ranks, dtype=torch.int32, device=device),
    )


@triton.jit
def _pack(
    hidden,
    expert_ids,
    weights,
    owner,
    local_ids,
    num_local,
    packed,
    packed_ids,
    packed_weights,
    counts,
    places,
    num_rows,
    num_ranks,
    num_experts,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rank, row = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, COLUMNS)
    before, count = 0, 0
    for first in range(0, num_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        is_choice = (rows < num_rows)[:, None] & (columns < TOP_K)[None, :]
        ids = tl.load(expert_ids + rows[:, None] * TOP_K + columns[None, :], mask=is_choice, other=num_experts)
        visits = tl.max((tl.load(owner + ids) == rank).to(tl.int32), axis=1)
        before += tl.sum(tl.where(rows < row, visits, 0), axis=0)
        count += tl.sum(visits, axis=0)
    is_column = columns < TOP_K
    ids = tl.load(expert_ids + row * TOP_K + columns, mask=is_column, other=num_experts)
    is_mine = tl.load(owner + ids) == rank
    goes = tl.max(is_mine.to(tl.int32), axis=0)
    none = tl.load(num_local + rank)
    start = rank.to(tl.int64) * num_rows
    if row == 0:
        tl.store(counts + rank, count)
    tl.store(places + row * num_ranks + rank, tl.where(goes > 0, before, -1))
    if row >= count:  # as many programs as there are places behind the rank's last row
        there = (start + row) * TOP_K + columns
        tl.store(packed_ids + there, (columns * 0 + none).to(tl.int32), mask=is_column)
        tl.store(packed_weights + there, columns * 0.0, mask=is_column)
    if goes > 0:
        there = (start + before) * TOP_K + columns
        local = tl.where(is_mine, tl.load(local_ids + ids), none)
        tl.store(packed_ids + there, local.to(tl.int32), mask=is_column)
        shares = tl.load(weights + row * TOP_K + columns, mask=is_column, other=0.0).to(tl.float32)
        tl.store(packed_weights + there, tl.where(is_mine, shares, 0.0), mask=is_column)
        for part in range(0, SIZE, BLOCK):
            numbers = part + tl.arange(0, BLOCK)
            moved = tl.load(hidden + row.to(tl.int64) * SIZE + numbers, mask=numbers < SIZE)
            tl.store(packed + (start + before) * SIZE + numbers, moved, mask=numbers < SIZE)


@triton.jit
def _add(returned, places, output, num_rows, SIZE: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    numbers = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for rank in range(RANKS):
        place = tl.load(places + row * RANKS + rank)
        if place >= 0:
            from_rank = returned + (rank * num_rows + place).to(tl.int64) * SIZE
            sums += tl.load(from_rank + numbers, mask=numbers < SIZE, other=0.0).to(tl.float32)
    tl.store(output + row.to(tl.int64) * SIZE + numbers, sums.to(output.dtype.element_ty), mask=numbers < SIZE)
