"""Rows laid out for the ranks that own their experts, and their sums added up again, with no word from the host.

Dispatch between GPUs in a captured graph sends as many rows to every rank as there are: that is safe whatever rows
choose, and needs no count on the host. A row goes to a rank once, however many of its experts live there. It travels
as one run of bytes: its numbers, the weights of its experts, their ids.

Shapes: T rows of this rank, H hidden, K experts per row, R ranks, E experts of the layer, B bytes of a row.
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
class RowsOfRanks:
    """A message to all ranks or from them, and the parts of its rows: views of it."""

    message: torch.Tensor
    """[R, T, B] uint8"""
    hidden: torch.Tensor
    """[R, T, H]; of rows that have no expert there, nothing is written."""
    weights: torch.Tensor
    """[R, T, K] f32; 0 for "none"."""
    expert_ids: torch.Tensor
    """[R, T, K] int32 ids local to the receiving rank; its number of experts for "none"."""

    @classmethod
    def of(cls, message: torch.Tensor, dtype: torch.dtype, top_k: int) -> RowsOfRanks:
        """Return the parts of ``message``, whose rows' numbers are of ``dtype``."""
        ends = message.shape[2] - 8 * top_k, message.shape[2] - 4 * top_k
        hidden, weights, ids = message.tensor_split(ends, dim=2)
        return cls(message, hidden.view(dtype), weights.view(torch.float32), ids.view(torch.int32))


@dataclass(frozen=True, slots=True)
class PackedForRanks:
    """What each rank is sent; ``places`` is what `add_from_ranks` needs."""

    rows: RowsOfRanks
    """Those for a rank come first among its T."""
    sent: torch.Tensor
    """[R] int32 rows for each other rank, 0 for this one."""
    places: torch.Tensor
    """[T, R] int32: which of a rank's rows each row is; -1 where it does not go."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Rows that all ranks sent, in their order."""

    hidden: torch.Tensor
    """[R x T, H]; of rows that have no expert here, nothing is written."""
    expert_ids: torch.Tensor
    """[R x T, K] int64 local ids."""
    weights: torch.Tensor
    """[R x T, K] f32"""


def pack_for_ranks(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    owner: torch.Tensor,
    local_ids: torch.Tensor,
    num_local: torch.Tensor,
    home: int,
) -> PackedForRanks:
    """Lay out rows [T, H] with ``expert_ids`` [T, K] (E for "none") and ``weights`` [T, K], those of a rank ascending.

    ``owner`` and ``local_ids`` [E + 1]: the rank of each expert, R for none, and its id there; ``num_local`` [R]. All
    ids are int64. ``home``: this rank.
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
            packed.rows.hidden,
            packed.rows.expert_ids,
            packed.rows.weights,
            packed.sent,
            packed.places,
            num_rows,
            num_ranks,
            len(owner) - 1,
            home,
            packed.rows.hidden.stride(1),
            packed.rows.weights.stride(1),
            SIZE=hidden.shape[1],
            TOP_K=top_k,
            COLUMNS=triton.next_power_of_2(top_k),
            ROWS=_ROWS,
            BLOCK=_HIDDEN,
            num_warps=4,
        )
    else:
        packed.sent.zero_()
    return packed


def pack_for_ranks_reference(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    owner: torch.Tensor,
    local_ids: torch.Tensor,
    num_local: torch.Tensor,
    home: int,
) -> PackedForRanks:
    """Do the same on the host."""
    packed = _empty(hidden, expert_ids.shape[1], len(num_local))
    packed.rows.expert_ids.copy_(num_local[:, None, None])
    packed.rows.weights.zero_()
    packed.places.fill_(-1)
    for rank in range(len(num_local)):
        mine = owner[expert_ids] == rank
        rows = mine.any(dim=1).nonzero()[:, 0]
        packed.sent[rank] = len(rows) if rank != home else 0
        packed.places[rows, rank] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        packed.rows.hidden[rank, : len(rows)] = hidden[rows]
        ids = torch.where(mine, local_ids[expert_ids], num_local[rank])
        packed.rows.expert_ids[rank, : len(rows)] = ids[rows].int()
        packed.rows.weights[rank, : len(rows)] = torch.where(mine, weights, 0)[rows].float()
    return packed


def unpack_from_ranks(received: RowsOfRanks, num_local: torch.Tensor, home: int) -> Unpacked:
    """Take apart what this rank, ``home``, was sent; ``num_local`` [R] int64."""
    num_ranks, num_rows, size = received.hidden.shape
    top_k = received.weights.shape[2]
    unpacked = Unpacked(
        received.hidden.new_empty(num_ranks * num_rows, size),
        received.weights.new_empty(num_ranks * num_rows, top_k, dtype=torch.int64),
        received.weights.new_empty(num_ranks * num_rows, top_k),
    )
    if num_rows:
        _unpack[(num_ranks * num_rows,)](
            received.hidden,
            received.expert_ids,
            received.weights,
            num_local,
            unpacked.hidden,
            unpacked.expert_ids,
            unpacked.weights,
            home,
            received.hidden.stride(1),
            received.weights.stride(1),
            SIZE=size,
            TOP_K=top_k,
            COLUMNS=triton.next_power_of_2(top_k),
            BLOCK=_HIDDEN,
            num_warps=4,
        )
    return unpacked


def unpack_from_ranks_reference(received: RowsOfRanks, num_local: torch.Tensor, home: int) -> Unpacked:
    """Do the same in torch's operations."""
    hidden, ids, weights = received.hidden, received.expert_ids, received.weights
    return Unpacked(hidden.flatten(0, 1).clone(), ids.flatten(0, 1).long(), weights.flatten(0, 1).clone())


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
    num_bytes = hidden.shape[1] * hidden.itemsize + 8 * top_k
    message = torch.empty(num_ranks, num_rows, num_bytes, dtype=torch.uint8, device=device)
    return PackedForRanks(
        RowsOfRanks.of(message, hidden.dtype, top_k),
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
    sent,
    places,
    num_rows,
    num_ranks,
    num_experts,
    home,
    hidden_stride,
    choice_stride,
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
        tl.store(sent + rank, tl.where(rank == home, 0, count))
    tl.store(places + row * num_ranks + rank, tl.where(goes > 0, before, -1))
    if row >= count:  # as many programs as there are places behind the rank's last row
        there = (start + row) * choice_stride + columns
        tl.store(packed_ids + there, (columns * 0 + none).to(tl.int32), mask=is_column)
        tl.store(packed_weights + there, columns * 0.0, mask=is_column)
    if goes > 0:
        there = (start + before) * choice_stride + columns
        local = tl.where(is_mine, tl.load(local_ids + ids), none)
        tl.store(packed_ids + there, local.to(tl.int32), mask=is_column)
        shares = tl.load(weights + row * TOP_K + columns, mask=is_column, other=0.0).to(tl.float32)
        tl.store(packed_weights + there, tl.where(is_mine, shares, 0.0), mask=is_column)
        for part in range(0, SIZE, BLOCK):
            numbers = part + tl.arange(0, BLOCK)
            moved = tl.load(hidden + row.to(tl.int64) * SIZE + numbers, mask=numbers < SIZE)
            tl.store(packed + (start + before) * hidden_stride + numbers, moved, mask=numbers < SIZE)


@triton.jit
def _unpack(
    packed,
    packed_ids,
    packed_weights,
    num_local,
    hidden,
    expert_ids,
    weights,
    home,
    hidden_stride,
    choice_stride,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    is_column = columns < TOP_K
    none = tl.load(num_local + home)
    ids = tl.load(packed_ids + row * choice_stride + columns, mask=is_column, other=2147483647).to(tl.int64)
    tl.store(expert_ids + row * TOP_K + columns, ids, mask=is_column)
    shares = tl.load(packed_weights + row * choice_stride + columns, mask=is_column, other=0.0)
    tl.store(weights + row * TOP_K + columns, shares, mask=is_column)
    if tl.min(ids, axis=0) < none:
        for part in range(0, SIZE, BLOCK):
            numbers = part + tl.arange(0, BLOCK)
            moved = tl.load(packed + row * hidden_stride + numbers, mask=numbers < SIZE)
            tl.store(hidden + row * SIZE + numbers, moved, mask=numbers < SIZE)


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
