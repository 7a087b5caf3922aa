"""Where experts are as one rank of a process group sees it: ranks that are absent from it are left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..router.budgeted_choice import LayerRanks
from ..router.placement import Placement
from .dispatch import AllToAllDispatcher, Dispatcher
from .expert_mover import ExpertMover


class GroupPlacement:
    """The placement of all ranks, and what is left of it for rank ``rank`` and those that it meets.

    ``mover``: who knows the placement that holds at present; None where experts stay.
    """

    def __init__(self, placement: Placement, rank: int, device: torch.device, mover: ExpertMover | None) -> None:
        self._first, self._rank, self._device, self._mover = placement, rank, device, mover
        self._absent: tuple[int, ...] = ()
        self.layers = self._layer_ranks(range(placement.num_layers))
        """Where budgets take the experts of each MoE layer to be."""

    @property
    def of_all(self) -> Placement:
        """Which ranks hold which experts, absent ones as well."""
        return self._first if self._mover is None else self._mover.present.placement

    def seat(self) -> tuple[Placement, int]:
        """Return where experts are in the process group, and this rank's number there."""
        placement = self.of_all.without(self._absent)
        assert placement is not None, "a group has all experts"
        return placement, self._rank - sum(rank < self._rank for rank in self._absent)

    def meet(self, absent: Sequence[int]) -> tuple[Placement, int]:
        """Be in a group without the ranks ``absent``, whose experts the others hold as well; return `seat` there."""
        self._absent = tuple(absent)
        self.layers[:] = self._layer_ranks(range(self.of_all.num_layers))
        return self.seat()

    def relocate(self, layers: Sequence[int], dispatchers: Sequence[Dispatcher]) -> None:
        """Change all that says where the experts of ``layers`` are, in place: graphs that read it serve on."""
        for layer, ranks in zip(layers, self._layer_ranks(layers), strict=True):
            self.layers[layer].owner.copy_(ranks.owner)
        if layers:
            placement, _ = self.seat()
            for dispatcher in dispatchers:
                if isinstance(dispatcher, AllToAllDispatcher):
                    dispatcher.relocate(placement, layers)

    def _layer_ranks(self, layers: Sequence[int]) -> list[LayerRanks]:
        placement, seat = self.seat()
        owners = (placement.owner_table(layer, seat)[:-1].to(self._device) for layer in layers)
        return [LayerRanks(owner, placement.num_ranks, seat) for owner in owners]
