"""Sums and orders of a row's numbers, each defined to the bit, so that a kernel can repeat them.

Shapes: N rows of E numbers.
"""

from __future__ import annotations

import torch


def row_sums(numbers: torch.Tensor) -> torch.Tensor:
    """Return the sums [N, 1] of ``numbers`` [N, E], added from left to right; on a CPU in float64, rounded once."""
    return numbers.cumsum(dim=1)[:, -1:]


def best_first(numbers: torch.Tensor) -> torch.Tensor:
    """Return [N, E] int64: where the row's ``numbers`` [N, E] are, largest first; of equal ones the leftmost.

    NaN counts as larger than all others.
    """
    return numbers.argsort(dim=1, descending=True, stable=True)
