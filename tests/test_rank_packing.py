"""Rows packed for ranks and their sums, by kernels and by torch's operations."""

from __future__ import annotations

import pytest
import torch

from .triton_device import DEVICE, chosen, poisoned, random

from penstock.kernels.rank_packing import (  # isort: skip
    RowsOfRanks,
    add_from_ranks,
    add_from_ranks_reference,
    pack_for_ranks,
    pack_for_ranks_reference,
    unpack_from_ranks,
    unpack_from_ranks_reference,
)
from penstock.router.placement import contiguous

pytestmark = pytest.mark.usefixtures("poisoned")
__all__ = ["poisoned"]


@pytest.mark.parametrize(
    ("num_rows", "num_ranks", "top_k", "size", "dtype"),
    [
        (1, 4, 2, 16, torch.float32),
        (9, 3, 3, 600, torch.bfloat16),
        (70, 2, 1, 16, torch.bfloat16),
        (0, 2, 2, 16, torch.float32),
    ],
)
def test_equals_its_reference(num_rows, num_ranks, top_k, size, dtype):
    num_experts = 10
    placement = contiguous(1, num_experts, num_ranks)
    tables = [placement.owner_table(0, 0), placement.local_ids(0, 0)]
    num_local = torch.tensor([len(placement.experts_of(0, rank)) for rank in range(num_ranks)])
    owner, local_ids, num_local = (table.to(DEVICE) for table in (*tables, num_local))
    hidden, weights = random(num_rows, size).to(dtype), random(num_rows, top_k, seed=1).to(dtype)
    ids = chosen(num_rows, num_experts, top_k) if num_rows else torch.zeros(0, top_k, dtype=torch.int64, device=DEVICE)
    home = num_ranks - 1
    result = pack_for_ranks(hidden, ids, weights, owner, local_ids, num_local, home)
    expected = pack_for_ranks_reference(hidden, ids, weights, owner, local_ids, num_local, home)
    for name in ("expert_ids", "weights"):
        assert torch.equal(getattr(result.rows, name), getattr(expected.rows, name)), name
    assert torch.equal(result.places, expected.places)
    assert torch.equal(result.sent, expected.sent)
    assert result.sent[home] == 0
    counts = (expected.places >= 0).sum(dim=0).tolist()
    for rank, count in enumerate(counts):
        assert torch.equal(result.rows.hidden[rank, :count], expected.rows.hidden[rank, :count])
    assert result.rows.message.shape == (num_ranks, num_rows, hidden.itemsize * size + 8 * top_k)
    for rank in range(num_ranks):  # as if all had sent it what this rank sends it
        message = expected.rows.message[rank].expand(num_ranks, -1, -1).contiguous()
        inbox = RowsOfRanks.of(message, dtype, top_k)
        found, wanted = (take(inbox, num_local, rank) for take in (unpack_from_ranks, unpack_from_ranks_reference))
        assert torch.equal(found.expert_ids, wanted.expert_ids)
        assert torch.equal(found.weights, wanted.weights)
        is_real = (wanted.expert_ids < num_local[rank]).any(dim=1)
        assert torch.equal(found.hidden[is_real], wanted.hidden[is_real])
        assert int(is_real.sum()) == num_ranks * counts[rank]
    returned = random(num_ranks, num_rows, size, seed=2).to(dtype)
    for rank, count in enumerate(counts):
        returned[rank, count:] = torch.nan  # what a rank makes of rows that nobody sent
    sums = add_from_ranks(returned, result.places)
    assert torch.isfinite(sums).all()
    torch.testing.assert_close(sums, add_from_ranks_reference(returned, expected.places), rtol=1e-2, atol=1e-2)
    if dtype == torch.float32:
        assert torch.equal(sums, add_from_ranks_reference(returned, expected.places))


def test_a_row_goes_to_a_rank_once():
    placement = contiguous(1, 8, 2)
    owner, local_ids = placement.owner_table(0, 0).to(DEVICE), placement.local_ids(0, 0).to(DEVICE)
    ids = torch.tensor([[0, 1, 2], [0, 4, 8], [8, 8, 8]], device=DEVICE)
    num_local = torch.tensor([4, 4], device=DEVICE)
    packed = pack_for_ranks(random(3, 16), ids, torch.ones(3, 3, device=DEVICE), owner, local_ids, num_local, 1)
    assert packed.sent.tolist() == [2, 0]
    assert packed.places.tolist() == [[0, -1], [1, 0], [-1, -1]]
    assert packed.rows.expert_ids.tolist() == [
        [[0, 1, 2], [0, 4, 4], [4, 4, 4]],
        [[4, 0, 4], [4, 4, 4], [4, 4, 4]],
    ]
