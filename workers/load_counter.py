"""What a rank's experts had to do since it was asked last, counted where the choices of rows are.

Shapes: T rows of this rank, V rows that reached it, K experts per row, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ..kernels.device import has_triton
from .rebalance_plan import ExpertLoads


class LoadCounter:
    """Adds up on a ``device`` with Triton in a buffer whose address never changes, and waits for it only in `take`."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self._num_experts = num_experts
        # Behind the experts: "none", and what this rank computes
        self._counts = np.zeros((num_layers, num_experts + 2), dtype=np.int64)
        self._on_device: torch.Tensor | None = None
        if has_triton(device):
            self._on_device = torch.zeros(self._counts.shape, dtype=torch.int64, device=device)

    def add(self, layer: int, chosen: torch.Tensor, received: torch.Tensor, num_local: int) -> None:
        """Count global ids ``chosen`` [T, K] here, and local ids ``received`` [V, K], ``num_local`` for none."""
        if self._on_device is None:
            counts = self._counts[layer]
            counts[:-1] += np.bincount(chosen.flatten().cpu().numpy(), minlength=self._num_experts + 1)
            counts[-1] += np.count_nonzero(received.cpu().numpy() < num_local)
        else:
            from ..kernels.load_counts import count_loads

            count_loads(self._on_device[layer], chosen, received, num_local)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Have what is counted meanwhile forgotten."""
        counts, on_device = self._counts.copy(), None if self._on_device is None else self._on_device.clone()
        yield
        self._counts[:] = counts
        if self._on_device is not None and on_device is not None:
            self._on_device.copy_(on_device)

    def take(self) -> ExpertLoads:
        """Return the counts and begin anew; one transfer from the device."""
        if self._on_device is not None:
            self._counts[:] = self._on_device.cpu().numpy()
            self._on_device.zero_()
        loads = ExpertLoads(self._counts[:, : self._num_experts].tolist(), self._counts[:, -1].tolist())
        self._counts[:] = 0
        return loads
