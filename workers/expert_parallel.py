"""The expert seam: transformers' experts interface over a dispatcher.

Shapes: T rows, H hidden, K experts per row, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..router.budgeted_selection import BudgetedSelection
from .dispatch import Dispatcher
from .experts import ExpertShard
from .plan import LayerCounts
from .rebalance_plan import ExpertLoads

EXPERTS = "penstock"


class ExpertParallel:
    """What the MoE layers of one rank share in a step: the dispatcher, the valid rows, and the counts."""

    def __init__(
        self,
        expert_modules: list[torch.nn.Module],
        num_experts: int,
        dispatcher: Dispatcher,
        *,
        counts_loads: bool = False,
    ) -> None:
        self.num_experts = num_experts
        self.dispatcher = dispatcher
        self.valid: torch.Tensor | None = None
        self.selections: Sequence[BudgetedSelection] = ()
        self.num_layers = len(expert_modules)
        for layer, module in enumerate(expert_modules):
            module.penstock = self  # type: ignore[assignment]
            module.penstock_layer = layer  # type: ignore[assignment]
        self.shards = [ExpertShard(module) for module in expert_modules]
        self._loads = _LoadCounter(self.num_layers, num_experts) if counts_loads else None
        self.begin(None)

    def begin(self, valid: torch.Tensor | None, selections: Sequence[BudgetedSelection] = ()) -> None:
        """Start a step.

        ``valid`` [T] is False on padding rows; None when there are none. ``selections``: of each layer, under a budget.
        """
        self.valid, self.selections = valid, selections
        zeros = [0] * self.num_layers
        self.counts = LayerCounts(list(zeros), list(zeros), list(zeros), list(zeros), list(zeros))

    def forward(
        self, module: torch.nn.Module, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Dispatch, compute, combine: [T, H] with ``expert_ids`` and ``weights`` [T, K] to [T, H]."""
        layer, counts = int(module.penstock_layer), self.counts  # type: ignore[arg-type]
        if self.selections:
            expert_ids = self.selections[layer].truncate(expert_ids, weights)
        if self.valid is not None:
            expert_ids = torch.where(self.valid[:, None], expert_ids, self.num_experts)
        received = self.dispatcher.dispatch(layer, hidden, expert_ids, weights)
        if self._loads is not None:
            self._loads.add(layer, expert_ids, received.expert_ids, self.shards[layer].num_experts)
        partial, num_active = self.shards[layer].run(received.hidden, received.expert_ids, received.weights)
        counts.rows[layer] = hidden.shape[0] if self.valid is None else int(self.valid.sum())
        counts.experts[layer] = num_active
        counts.rows_sent[layer] = received.rows_sent
        counts.payload_bytes[layer] = received.rows_sent * self.dispatcher.payload_bytes_per_row
        counts.wire_bytes[layer] = received.wire_bytes
        return self.dispatcher.combine(partial, received, hidden.shape[0])

    def take_loads(self) -> ExpertLoads:
        """Return what experts had to do since the last time; one transfer from the device."""
        assert self._loads is not None, "they are counted"
        return self._loads.take()


class _LoadCounter:
    """Counts where ids are, so that nothing waits for a device."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._num_experts = num_experts
        # Behind the experts: "none", and what this rank computes
        self._counts = np.zeros((num_layers, num_experts + 2), dtype=np.int64)
        self._on_device: torch.Tensor | None = None

    def add(self, layer: int, chosen: torch.Tensor, received: torch.Tensor, num_local: int) -> None:
        """Count global ids ``chosen`` [T, K] here, and local ids ``received`` [V, K], ``num_local`` for none."""
        if chosen.device.type == "cpu":
            counts = self._counts[layer]
            counts[:-1] += np.bincount(chosen.flatten().numpy(), minlength=self._num_experts + 1)
            counts[-1] += np.count_nonzero(received.numpy() < num_local)
            return
        if self._on_device is None:
            self._on_device = torch.from_numpy(self._counts).to(chosen.device)
        on_device = self._on_device[layer]
        flat = chosen.flatten()
        on_device.scatter_add_(0, flat, torch.ones_like(flat))
        on_device[-1] += (received < num_local).sum()

    def take(self) -> ExpertLoads:
        """Return the counts and begin anew."""
        if self._on_device is not None:
            self._counts[:] = self._on_device.cpu().numpy()
            self._on_device.zero_()
        loads = ExpertLoads(self._counts[:, : self._num_experts].tolist(), self._counts[:, -1].tolist())
        self._counts[:] = 0
        return loads


def experts_forward(
    module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Stand in for a transformers experts module's forward."""
    return module.penstock.forward(module, hidden, top_k_index, top_k_weights)  # type: ignore[union-attr]


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)
