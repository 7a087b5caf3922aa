"""Real ranks by a price list's clock: exact tokens and counts, at the time that such counts took elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from ..cluster.engine.ranks import Ranks, Replacement
from ..workers.plan import StepPlan, StepResult
from .step_times import StepTimes


class PricedRanks:
    """Ranks of engine runs. ``now_s`` is their clock: every step adds what the price list says of its counts."""

    def __init__(self, ranks: Ranks, times: StepTimes) -> None:
        self.infos = ranks.infos
        self._ranks, self._times = ranks, times
        self.now_s = 0.0

    def clock(self) -> float:
        """Return the time."""
        return self.now_s

    def step(self, plan: StepPlan) -> StepResult:
        """Run the step; it takes as long as its rows and distinct experts are priced at."""
        result = self._ranks.step(plan)
        model = self.infos[0].model
        rows = [max(1, sum(len(request.token_ids) for request in rank.requests)) for rank in plan.ranks]
        experts = [rank.counts.experts for rank in result.ranks]
        self.now_s += self._times.step_s(rows, experts, model.num_experts_per_tok)
        return result

    def recover(self, generation: int) -> Sequence[Replacement]:
        """As the ranks do."""
        return self._ranks.recover(generation)

    def close(self) -> None:
        """The ranks stay: other engines use them."""
