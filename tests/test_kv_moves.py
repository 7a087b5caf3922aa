"""KV of accepted rows moved by a kernel, and on the host."""

from __future__ import annotations

import pytest
import torch

from .triton_device import DEVICE, random

from penstock.kernels.kv_moves import AcceptedRows, Pools, move_accepted, move_accepted_reference  # isort: skip


def tensor(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accepted_rows_follow_the_committed_tokens(dtype):
    accepted = AcceptedRows(
        path=tensor([[0, 2, 3, 6], [1, 2, -1, -1], [0, 3, -1, -1], [-1] * 4]),
        num_rows=tensor([4, 2, 2, 0]),
        committed=tensor([5, 3, 2, 7]),
        tables=tensor([[3, 0, 7, 5], [2, 8, 0, 0], [9, 6, 0, 0], [1, 4, 10, 11]]),
        block_size=4,
    )
    pools = [random(48, *shape, seed=seed).to(dtype) for seed, shape in enumerate([(2, 8), (1, 300), (2, 8)])]
    expected, before = ([pool.clone() for pool in pools] for _ in range(2))
    move_accepted(Pools.of(pools), accepted)
    move_accepted_reference(expected, accepted)
    for found, wanted, old in zip(pools, expected, before, strict=True):
        assert torch.equal(found, wanted)
        changed = (found != old).flatten(1).any(dim=1).nonzero()[:, 0].tolist()
        assert changed == [2, 3, 28, 39], "places 6, 7 and 8 of the first request, 3 of the third"
