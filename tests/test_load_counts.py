"""What experts have to do, counted by a kernel and without one."""

from __future__ import annotations

import pytest
import torch

from .triton_device import DEVICE, chosen

from penstock.kernels.device import triton_on  # isort: skip
from penstock.kernels.load_counts import count_loads, count_loads_reference
from penstock.workers.load_counter import LoadCounter


@pytest.mark.parametrize(
    ("num_rows", "num_received", "dtype"), [(1, 70, torch.int64), (200, 3, torch.int32), (5, 0, torch.int64)]
)
def test_equals_its_reference(num_rows: int, num_received: int, dtype: torch.dtype) -> None:
    ids = chosen(num_rows, 10, 3)
    received = chosen(num_received, 4, 3, seed=1).to(dtype) if num_received else ids[:0]
    counts = torch.arange(12, device=DEVICE)
    expected = counts.clone()
    for _ in range(2):
        count_loads(counts, ids, received, 4)
        count_loads_reference(expected, ids, received, 4)
    assert torch.equal(counts, expected)


def test_a_counter_says_the_same_with_and_without_the_kernel() -> None:
    said = []
    with triton_on(DEVICE.type):
        for launches in (True, False):
            counter = LoadCounter(2, 10, DEVICE)
            assert counter._on_device is not None
            if not launches:
                counter._on_device = None
            for seed in range(3):
                counter.add(seed % 2, chosen(7, 10, 3, seed), chosen(9, 4, 3, seed), 4)
            with counter.unchanged():
                counter.add(0, chosen(7, 10, 3), chosen(9, 4, 3), 4)
            said.append(counter.take())
            assert sum(counter.take().computed) == 0, "it begins anew"
    assert said[0] == said[1]
    assert all(sum(layer) > 0 for layer in said[0].chosen)
