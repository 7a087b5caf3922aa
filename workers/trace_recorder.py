"""What the routers of a step chose, kept as it passes to the experts.

Shapes: T rows of a step, L MoE layers, K experts per row.
"""

from __future__ import annotations

import torch

from .dispatch import LocalDispatcher, Received


class TraceRecorder(LocalDispatcher):
    """The dispatcher of a single rank, which remembers the last step."""

    def __init__(self, num_layers: int) -> None:
        self._ids: list[torch.Tensor | None] = [None] * num_layers
        self._weights: list[torch.Tensor | None] = [None] * num_layers

    def dispatch(self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> Received:
        """Return the rows themselves, their experts and weights remembered."""
        self._ids[layer], self._weights[layer] = expert_ids, weights
        return super().dispatch(layer, hidden, expert_ids, weights)

    def last_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return expert ids [T, L, K] int16 and weights [T, L, K] f16 of the last step, on the CPU."""
        ids, weights = ([t for t in kept if t is not None] for kept in (self._ids, self._weights))
        return torch.stack(ids, dim=1).to("cpu", torch.int16), torch.stack(weights, dim=1).to("cpu", torch.float16)
