"""Ranks in processes of their own that count which steps they are sent while they run another."""

from __future__ import annotations

from collections.abc import Sequence

from ..cluster.engine.ranks import Replacement
from ..cluster.transport.process_ranks import ProcessRanks
from ..workers.plan import StepPlan, StepResult


class AheadRanks(ProcessRanks):
    """Counts steps, and those of them that were sent before the one before them had been collected."""

    num_ahead = num_steps = _num_under_way = 0

    def submit(self, plan: StepPlan) -> None:
        """Send a step and count it."""
        self.num_steps += 1
        self.num_ahead += bool(self._num_under_way)
        self._num_under_way += 1
        super().submit(plan)

    def collect(self, plan: StepPlan) -> StepResult:
        """Wait for the oldest step."""
        try:
            return super().collect(plan)
        finally:
            self._num_under_way -= 1

    def recover(self, generation: int) -> Sequence[Replacement]:
        """Give all steps up."""
        self._num_under_way = 0
        return super().recover(generation)
