"""Experts that kernels read where they lie: each in a slot of tensors that never change their address.

A captured graph holds those addresses, so experts come and go by being copied into slots, and a table on the device
says which slot each is in. What stays keeps its slot, whatever its number becomes: a switch copies what has arrived and
nothing else.

Shapes: E experts held here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..kernels.expert_weights import ExpertWeights
    from .experts import Tensors


class SlottedExperts:
    """E experts of the projections ``up`` and ``down``, to whose memory it refers. ``moves``: whether they ever may."""

    def __init__(self, up: ExpertWeights, down: ExpertWeights, *, moves: bool) -> None:
        self._parts = [*up.parts, *down.parts]
        self._slot_of = list(range(up.num_experts))
        self.slots: torch.Tensor | None = None
        """[E] int32: where each expert lies, which `hold` changes in place; None where they never move."""
        if moves:
            self.slots = torch.arange(up.num_experts, dtype=torch.int32, device=up.values.device)

    def tensors(self, expert: int) -> Tensors:
        """Return the tensors that make an expert: views of its slot."""
        return tuple(part[self._slot_of[expert]] for part in self._parts)

    def room(self) -> Tensors:
        """Return memory for what `tensors` gives of one more expert."""
        return tuple(torch.empty_like(tensor) for tensor in self.tensors(0))

    def hold(self, experts: Sequence[int | Tensors]) -> list[Tensors]:
        """Hold as many ``experts`` as before in that order: those held so far by number, others by their tensors.

        The others are copied to the slots of those that are not named; return their tensors, which are free then. In
        the order of the device's stream: steps that it has been given before read what was there before.
        """
        assert self.slots is not None, "whoever captures steps says whether experts may move"
        assert len(experts) == len(self._slot_of), "slots are fixed"
        stay = {expert for expert in experts if isinstance(expert, int)}
        free = iter([slot for expert, slot in enumerate(self._slot_of) if expert not in stay])
        copied = []
        slot_of = []
        for expert in experts:
            if isinstance(expert, int):
                slot_of.append(self._slot_of[expert])
                continue
            slot_of.append(next(free))
            for part, tensor in zip(self._parts, expert, strict=True):
                part[slot_of[-1]].copy_(tensor)
            copied.append(expert)
        self._slot_of = slot_of
        self.slots.copy_(torch.tensor(slot_of, dtype=torch.int32))
        return copied
