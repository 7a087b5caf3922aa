"""What a layer's router made of its rows, and which of them a budget acts on.

Shapes: T rows of this rank, E experts of the layer, K experts per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .order import row_sums


@dataclass(frozen=True, slots=True)
class Routing:
    """The router's own choice for T rows."""

    scores: torch.Tensor
    """[T, E] what it selects by; experts outside a row's groups are at 0 or -inf."""
    affinities: torch.Tensor
    """[T, E] in [0, 1]: softmax or sigmoid of its logits, free of biases and groups."""
    values: torch.Tensor
    """[T, K] the scores of those it selected."""
    ids: torch.Tensor
    """[T, K] those it selected."""
    in_groups: bool = True
    """Whether the router may have limited rows to groups of experts; a selection has less to do where it has not."""

    @property
    def shares(self) -> torch.Tensor:
        """[T, K] f32: each selected expert's share of its row's weight."""
        return row_shares(self.affinities.gather(1, self.ids))


@dataclass(frozen=True)
class BudgetedRows:
    """Which of T rows a budget acts on, and which of them share a list of experts; one for all layers of a step."""

    budgeted: torch.Tensor
    """[T] bool: rows that verify drafts."""
    valid: torch.Tensor | None
    """[T] bool, False on padding rows; None when there are none."""
    groups: torch.Tensor
    """[T] int64 in [0, num_groups): rows of a group share one list."""
    num_groups: int
    reach: torch.Tensor
    """[T] f32 in [0, 1]: probability that the row's token is used."""
    num_experts: torch.Tensor | None = None
    """[1] int64: how many experts the budget keeps, where a graph reads it on the device; None: its own number."""
    all_budgeted: bool = False
    """Whether the host knows that every row is, so that nothing needs to be done for others."""

    @cached_property
    def free(self) -> torch.Tensor:
        """[T] bool: rows that a budget does not act on, padding among them."""
        return ~self.budgeted

    @cached_property
    def unbudgeted(self) -> torch.Tensor:
        """[T] bool: rows whose experts are loaded whatever the budget says."""
        return self.free if self.valid is None else self.free & self.valid

    @cached_property
    def counted_groups(self) -> torch.Tensor:
        """[T] int64: the groups of budgeted rows, ``num_groups`` for others."""
        return self.groups if self.all_budgeted else self.groups.masked_fill(self.free, self.num_groups)

    @cached_property
    def loading_groups(self) -> torch.Tensor:
        """[T] int64: the groups of `unbudgeted` rows, ``num_groups`` for others."""
        return self.groups.masked_fill(~self.unbudgeted, self.num_groups)


def row_shares(weights: torch.Tensor) -> torch.Tensor:
    """Return non-negative ``weights`` [T, N] as f32 shares of their row's sum; a row of zeros stays."""
    weights = weights.float()
    return weights / row_sums(weights).clamp_min(torch.finfo(torch.float32).tiny)
