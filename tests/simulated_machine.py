"""Machines for simulated speculation: true step times, exact counts and a noisy clock."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NUM_EXPERTS, TOP_K = 32, 4
# Measured on a trained model's code (32 experts, top-4): rows -> distinct experts per layer
MEASURED_EXPERTS = {1: 4.0, 2: 6.6, 3: 8.9, 4: 10.9, 5: 12.4, 6: 13.8, 7: 15.2, 8: 16.1, 16: 21.6, 32: 26.5, 512: 32.0}


def measured_experts(num_rows: int) -> float:
    """Interpolate the measured curve in the logarithm of rows."""
    if num_rows in MEASURED_EXPERTS:
        return MEASURED_EXPERTS[num_rows]
    low = max(n for n in MEASURED_EXPERTS if n < num_rows)
    high = min((n for n in MEASURED_EXPERTS if n > num_rows), default=low)
    if high == low:
        return MEASURED_EXPERTS[low]
    share = math.log(num_rows / low) / math.log(high / low)
    return (1 - share) * MEASURED_EXPERTS[low] + share * MEASURED_EXPERTS[high]


@dataclass(frozen=True)
class Machine:
    """What a step truly costs, and what its clock says. Defaults: the committed prices per step and per expert."""

    num_ranks: int = 1
    fixed_s: float = 2.44e-3
    per_row_s: float = 0.0
    per_expert_s: float = 0.372e-3
    per_row_sent_s: float = 0.0
    row_buckets: Sequence[int] = ()
    """Rows are padded to the next of these for ``per_row_s``, as captured graphs do."""
    table: Callable[[int], float] | None = None
    """Time by rows of all ranks, instead of the prices."""
    drift: Callable[[int], float] = lambda step: 1.0
    """Factor on all times, by step."""
    noise: float = 0.0
    """Standard deviation of the clock's log-normal factor."""
    choice_s: float = 0.0
    """What choosing within a budget of experts adds to a step."""
    outliers: float = 0.0
    """Share of steps whose clock says ten times as much."""
    experts_noise: float = 0.05

    def experts(self, num_rows: int, rng: random.Random) -> list[float]:
        """Count distinct experts on every rank."""
        spread = 1 + self.experts_noise * rng.uniform(-1, 1)
        each = measured_experts(num_rows) * spread / self.num_ranks
        return (
            [min(each * rng.uniform(1.0, 1.1), NUM_EXPERTS / self.num_ranks) for _ in range(self.num_ranks)]
            if (self.num_ranks > 1)
            else [min(each, NUM_EXPERTS)]
        )

    def step_s(
        self,
        rows: Sequence[int],
        experts: Sequence[float],
        rows_sent: Sequence[float],
        step: int,
        *,
        is_budgeted: bool = False,
    ) -> float:
        """True time of a step in lock-step."""
        if self.table is not None:
            return self.table(sum(rows)) * self.drift(step)
        padded = min((b for b in self.row_buckets if b >= max(rows)), default=max(rows))
        time_s = self.fixed_s + self.per_row_s * padded + self.per_expert_s * max(experts)
        time_s += self.per_row_sent_s * max(rows_sent) + self.choice_s * is_budgeted
        return time_s * self.drift(step)

    def clock_s(self, true_s: float, rng: random.Random) -> float:
        """What the clock says of a step."""
        factor = rng.lognormvariate(0, self.noise) if self.noise else 1.0
        return true_s * factor * (10.0 if rng.random() < self.outliers else 1.0)


@dataclass(frozen=True)
class TrueLevel:
    """What a level of budget truly leaves where all rows of a step keep to it."""

    experts: Callable[[int], float] = lambda num_rows: 1.0
    """By rows: the share of the experts that they would read."""
    sent: float = 1.0
    """Of the rows that they would send."""


def at_most(num_experts: int) -> Callable[[int], float]:
    """Return the shares that so many experts leave to rows that share a list."""
    return lambda num_rows: min(1.0, num_experts / measured_experts(num_rows))


NOISY = {"noise": 0.2, "outliers": 0.02}


def _measured_table(num_rows: int) -> float:
    """A tuned bf16 kernel over many large experts: rows -> time, measured relative to one row."""
    known = {1: 1.0, 2: 1.5, 3: 1.9, 4: 2.3, 8: 3.2, 16: 4.5, 32: 5.8, 128: 9.0, 512: 20.0}
    low = max(n for n in known if n <= num_rows)
    high = min((n for n in known if n >= num_rows), default=low)
    share = (num_rows - low) / (high - low) if high > low else 0.0
    return 1e-2 * (known[low] + share * (known[high] - known[low]))


PRICED = Machine()
MACHINES = {
    "priced": PRICED,
    "memory bound": Machine(fixed_s=0.0, per_expert_s=1e-3),
    "measured table": Machine(table=_measured_table),
    "compute bound": Machine(fixed_s=1e-3, per_row_s=2e-3, per_expert_s=1e-5),
    "free rows": Machine(fixed_s=5e-3, per_expert_s=1e-5),
    "padded graphs": Machine(fixed_s=1e-3, per_row_s=0.3e-3, row_buckets=(1, 2, 4, 8, 16, 32, 64), per_expert_s=0.3e-3),
}
