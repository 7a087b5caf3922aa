"""Rows packed for ranks and their sums, by kernels and by torch's operations."""

from __future__ import annotations

import pytest
import torch

from .triton_device import DEVICE, chosen, poisoned, random

from penstock.kernels.rank_packing import (  # isort: skip
    add_from_ranks,
    add_from_ranks_reference,
    pack_for_ranks,
    pack_for_ranks_reference,
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
    result = pack_for_ranks(hidden, ids, weights, owner, local_ids, num_local)
    expected = pack_for_ranks_reference(hidden, ids, weights, owner, local_ids, num_local)
    for name in ("expert_ids", "weights", "counts", "places"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name
    for rank, count in enumerate(expected.counts.tolist()):
        assert torch.equal(result.hidden[rank, :count], expected.hidden[rank, :count])
    returned = random(num_ranks, num_rows, size, seed=2).to(dtype)
    for rank, count in enumerate(expected.counts.tolist()):
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
    packed = pack_for_ranks(random(3, 16), ids, torch.ones(3, 3, device=DEVICE), owner, local_ids, num_local)
    assert packed.counts.tolist() == [2, 1]
    assert packed.places.tolist() == [[0, -1], [1, 0], [-1, -1]]
    assert packed.expert_ids.tolist() == [
        [[0, 1, 2], [0, 4, 4], [4, 4, 4]],
        [[4, 0, 4], [4, 4, 4], [4, 4, 4]],
    ]
