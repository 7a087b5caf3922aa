"""A placement of the tiny checkpoints' eight experts on two ranks, of another map and other numbers in each layer."""

from __future__ import annotations

from penstock.router.placement import Placement
from penstock.workers.loader import LoadedModel

NUM_EXPERTS = 8
# Neither equal nor contiguous runs; in the second layer rank 0 holds more, and both hold experts 1 and 6
_LAYERS = (
    ((1,), (0,), (1,), (1,), (0,), (1,), (0,), (1,)),
    ((0,), (0, 1), (0,), (1,), (0,), (0,), (0, 1), (0,)),
)


def uneven(num_layers: int) -> Placement:
    return Placement(NUM_EXPERTS, 2, tuple(_LAYERS[layer % 2] for layer in range(num_layers)))


def owned_by_name(loaded: LoadedModel, placement: Placement, rank: int) -> dict[str, list[int]]:
    """Parameters with one entry per expert, and the experts whose entries ``rank`` holds."""
    layers = {id(module): layer for layer, module in enumerate(loaded.expert_modules)}
    return {
        f"{path}.{name}": placement.experts_of(layers[id(module)], rank)
        for path, module in loaded.model.named_modules()
        if id(module) in layers
        for name, _ in module.named_parameters(recurse=False)
    }
