"""What a rank's model made of a step, whichever way it ran: before drafts are accepted and the answer is sent.

Shapes: S sampled rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .plan import KeptWeight, LayerCounts


@dataclass(frozen=True, slots=True)
class ComputedStep:
    """One rank's step."""

    tokens: list[int] | None
    """[S] the tokens chosen; None where the requests ask for more than temperature does."""
    accepted: list[tuple[list[int], list[int]]] | None
    """What `sampler.accept` returns for each request of the plan, where the device walked along their drafts, and moved
    their KV; else None."""
    logits_of: Callable[[], torch.Tensor]
    """Makes `logits`, which a step whose tokens are chosen has no use for."""
    positions: list[int]
    """[S] absolute positions of the tokens chosen."""
    counts: LayerCounts
    kept_weights: dict[int, KeptWeight]
    num_collectives: int
    collectives_crc: int

    @property
    def logits(self) -> torch.Tensor:
        """[S + scored rows, V] of the sampled rows in the plan's order, then of those whose targets are scored."""
        return self.logits_of()
