"""One budget of experts among those that a server may keep its verifications to, as a controller sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BudgetLevel:
    """What a budget is expected to save before it has been tried."""

    experts_saved: float
    """Share of distinct experts, in [0, 1), of verifications of ``num_rows`` rows."""
    num_rows: int = 8
    ranks_kept: float = 1.0
    """Share of rows sent between ranks that it leaves."""

    def experts_kept(self, num_rows: int) -> float:
        """Return the share of distinct experts that a step of ``num_rows`` rows is expected to read under it.

        All of them with one row, which a budget leaves alone; as calibrated with so many rows as then, or more.
        """
        return 1 - self.experts_saved * min(1.0, math.log(num_rows) / math.log(max(2, self.num_rows)))
