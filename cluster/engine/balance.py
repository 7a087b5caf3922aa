"""How even the ranks' work is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Balance:
    """What is known of it now."""

    last_rebalance_age_s: float
    """Since the last rebalance that finished, or found ranks even; since the start before any."""
    imbalance: float | None
    """The busiest rank's rows over the mean, as ranks last counted them (`router.rebalance`); None before that."""
