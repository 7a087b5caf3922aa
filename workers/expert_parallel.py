"""The expert seam: transformers' experts interface over a dispatcher.

Shapes: T rows, H hidden, K experts per row, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..router.budgeted_selection import BudgetedSelection
from .dispatch import Dispatcher
from .experts import ExpertShard
from .load_counter import LoadCounter
from .plan import LayerCounts
from .rebalance_plan import ExpertLoads

EXPERTS = "penstock"


class ExpertParallel:
    """What the MoE layers of one rank share in a step: the dispatcher, the valid rows, and the counts.

    ``moves``: experts may move between ranks, and what they have to do is counted.
    """

    def __init__(
        self,
        expert_modules: list[torch.nn.Module],
        num_experts: int,
        dispatcher: Dispatcher,
        *,
        moves: bool = False,
    ) -> None:
        self.num_experts = num_experts
        self.dispatcher = dispatcher
        self.valid: torch.Tensor | None = None
        self.selections: Sequence[BudgetedSelection] = ()
        self.num_layers = len(expert_modules)
        for layer, module in enumerate(expert_modules):
            module.penstock = self  # type: ignore[assignment]
            module.penstock_layer = layer  # type: ignore[assignment]
        self.shards = [ExpertShard(module, moves=moves) for module in expert_modules]
        self._loads = LoadCounter(self.num_layers, num_experts, self.shards[0].device) if moves else None
        self.begin(None)

    @property
    def is_capturable(self) -> bool:
        """Whether no layer's experts ask the device for anything, so that a graph can capture a step."""
        return all(shard.is_capturable for shard in self.shards)

    def begin(
        self,
        valid: torch.Tensor | None,
        selections: Sequence[BudgetedSelection] = (),
        num_valid: int = 0,
        *,
        ids_are_final: bool = False,
    ) -> None:
        """Start a step.

        ``valid`` [T] is False on padding rows; None when there are none. ``num_valid``: the others, if there are any.
        ``selections``: of each layer, under a budget. ``ids_are_final``: routers leave padding rows without experts.
        """
        self.valid, self.selections, self._num_valid = valid, selections, num_valid
        self._ids_are_final = ids_are_final
        self._num_rows = [0] * self.num_layers
        self.wire_bytes = [0] * self.num_layers
        """Sent in this step so far, per layer."""
        self._num_active: list[int | torch.Tensor] = [0] * self.num_layers
        self._rows_sent: list[int | torch.Tensor] = [0] * self.num_layers

    def counts_on(self, device: torch.device) -> torch.Tensor:
        """Return [2, L] int64 on ``device``: distinct experts, and rows sent; without a copy from the host."""
        return torch.stack([_on(device, self._num_active), _on(device, self._rows_sent)])

    def finish(self) -> LayerCounts:
        """Return the step's counts, once all layers have run: waits once for a device that has some of them."""
        known = [*self._num_active, *self._rows_sent]
        on_device = next((number.device for number in known if isinstance(number, torch.Tensor)), None)
        counts: list[Any] = known if on_device is None else self.counts_on(on_device).flatten().tolist()
        num_active, rows_sent = counts[: self.num_layers], counts[self.num_layers :]
        payload = [number * self.dispatcher.payload_bytes_per_row for number in rows_sent]
        return LayerCounts(self._num_rows, num_active, rows_sent, payload, self.wire_bytes)

    def forward(
        self, module: torch.nn.Module, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Dispatch, compute, combine: [T, H] with ``expert_ids`` and ``weights`` [T, K] to [T, H]."""
        layer = int(module.penstock_layer)  # type: ignore[arg-type]
        if self.selections:
            expert_ids = self.selections[layer].truncate(expert_ids, weights)
        if self.valid is not None and not self._ids_are_final:
            expert_ids = torch.where(self.valid[:, None], expert_ids, self.num_experts)
        received = self.dispatcher.dispatch(layer, hidden, expert_ids, weights)
        if self._loads is not None:
            self._loads.add(layer, expert_ids, received.expert_ids, self.shards[layer].num_experts)
        partial, num_active = self.shards[layer].run(received.hidden, received.expert_ids, received.weights)
        self._num_rows[layer] = hidden.shape[0] if self.valid is None else self._num_valid
        self._num_active[layer], self._rows_sent[layer] = num_active, received.rows_sent
        self.wire_bytes[layer] = received.wire_bytes
        return self.dispatcher.combine(partial, received, hidden.shape[0])

    def uncounted(self) -> AbstractContextManager[None]:
        """Have steps that run meanwhile count as no load: whoever captures one runs it more than once."""
        return nullcontext() if self._loads is None else self._loads.unchanged()

    def take_loads(self) -> ExpertLoads:
        """Return what experts had to do since the last time; one transfer from the device."""
        assert self._loads is not None, "they are counted"
        return self._loads.take()


def _on(device: torch.device, numbers: Sequence[int | torch.Tensor]) -> torch.Tensor:
    """Return ``numbers`` [L], or the sums of those that have several parts, as int64.

    In few operations, and none that copies from the host, which a graph cannot capture.
    """
    tensors = [number for number in numbers if isinstance(number, torch.Tensor)]
    if len(tensors) == len(numbers):
        return torch.stack(tensors).view(len(numbers), -1).sum(dim=1)
    known = {number for number in numbers if isinstance(number, int)}
    if not tensors and len(known) == 1:
        return torch.full((len(numbers),), known.pop(), dtype=torch.int64, device=device)
    return torch.stack([_on(device, [number])[0] for number in numbers])


def experts_forward(
    module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Stand in for a transformers experts module's forward."""
    return module.penstock.forward(module, hidden, top_k_index, top_k_weights)  # type: ignore[union-attr]


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)
