"""Recorded ranks that can be sent a step while they run another, and wait for one that they were not sent before."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..workers.model_info import RankInfo
from ..workers.plan import StepPlan, StepResult
from .recorded_ranks import RecordedRanks, RowComputer
from .step_times import StepTimes


@dataclass(frozen=True, slots=True)
class Waits:
    """What passes between two results beside the later step itself, by the clock of the run."""

    after_s: float
    """Where that one was planned after the result of the one before: messages and planning."""
    ahead_s: float
    """Where ranks had it already."""


class SentRanks(RecordedRanks):
    """Like `QueueingRanks`; a step waits as long as ``waits`` says before it runs."""

    def __init__(self, computer: RowComputer, info: RankInfo, num_ranks: int, times: StepTimes, waits: Waits) -> None:
        super().__init__(computer, info, num_ranks, times)
        self._waits = waits
        self._sent: list[tuple[StepPlan, bool]] = []
        """Steps that were not collected, and whether each was sent while another was under way."""
        self._sampled: dict[int, int] = {}
        """The last token of each request in the step before."""
        self.num_steps = self.num_ahead = 0

    def step(self, plan: StepPlan) -> StepResult:
        """Run a step that was planned after the one before."""
        self.submit(plan)
        return self.collect(plan)

    def submit(self, plan: StepPlan) -> None:
        """Take a step."""
        self._sent.append((plan, bool(self._sent)))

    def collect(self, plan: StepPlan) -> StepResult:
        """Run the oldest step."""
        plan, is_ahead = self._sent.pop(0)
        self.num_steps += 1
        self.num_ahead += is_ahead
        self.now_s += self._waits.ahead_s if is_ahead else self._waits.after_s
        parts = [
            replace(rank, requests=[request.filled_in(self._sampled) for request in rank.requests])
            for rank in plan.ranks
        ]
        result = super().step(replace(plan, ranks=parts))
        self._sampled = {
            request.request_id: tokens[-1]
            for part, rank in zip(parts, result.ranks, strict=True)
            for request, tokens in zip(part.requests, rank.token_ids, strict=True)
            if tokens
        }
        return replace(result, ranks=[replace(rank, ran_s=result.wall_s) for rank in result.ranks])
