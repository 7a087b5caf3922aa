"""The expert seam: transformers' experts interface over a dispatcher.

Shapes: T rows, H hidden, K experts per row, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..router.budgeted_selection import BudgetedSelection
from .dispatch import Dispatcher
from .experts import ExpertShard
from .plan import LayerCounts

EXPERTS = "penstock"


class ExpertParallel:
    """What the MoE layers of one rank share in a step: the dispatcher, the valid rows, and the counts."""

    def __init__(self, expert_modules: list[torch.nn.Module], num_experts: int, dispatcher: Dispatcher) -> None:
        self.num_experts = num_experts
        self.dispatcher = dispatcher
        self.valid: torch.Tensor | None = None
        self.selections: Sequence[BudgetedSelection] = ()
        self.num_layers = len(expert_modules)
        for layer, module in enumerate(expert_modules):
            module.penstock = self  # type: ignore[assignment]
            module.penstock_layer = layer  # type: ignore[assignment]
        self.shards = [ExpertShard(module) for module in expert_modules]
        self.begin(None)

    def begin(self, valid: torch.Tensor | None, selections: Sequence[BudgetedSelection] = ()) -> None:
        """Start a step.

        ``valid`` [T] is False on padding rows; None when there are none. ``selections``: of each layer, under a budget.
        """
        self.valid, self.selections = valid, selections
        self._num_valid = None if valid is None else int(valid.sum())
        self._active: dict[int, torch.Tensor] = {}
        """Counts of distinct experts that are still on the device, by layer."""
        zeros = [0] * self.num_layers
        self.counts = LayerCounts(list(zeros), list(zeros), list(zeros), list(zeros), list(zeros))

    def finish(self) -> LayerCounts:
        """Return the step's counts, once all layers have run: waits once for a device that still has some."""
        if self._active:
            for layer, num_active in zip(self._active, torch.stack([*self._active.values()]).tolist(), strict=True):
                self.counts.experts[layer] = num_active
            self._active = {}
        return self.counts

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
        partial, num_active = self.shards[layer].run(received.hidden, received.expert_ids, received.weights)
        counts.rows[layer] = hidden.shape[0] if self._num_valid is None else self._num_valid
        if isinstance(num_active, int):
            counts.experts[layer] = num_active
        else:
            self._active[layer] = num_active
        counts.rows_sent[layer] = received.rows_sent
        counts.payload_bytes[layer] = received.rows_sent * self.dispatcher.payload_bytes_per_row
        counts.wire_bytes[layer] = received.wire_bytes
        return self.dispatcher.combine(partial, received, hidden.shape[0])


def experts_forward(
    module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Stand in for a transformers experts module's forward."""
    return module.penstock.forward(module, hidden, top_k_index, top_k_weights)  # type: ignore[union-attr]


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)
