"""Ranks that are given steps ahead, in this process: what is sent waits its turn, as in the socket of a real rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from penstock.cluster.engine.ranks import Ranks, Replacement
from penstock.workers.plan import StepFailedError, StepPlan, StepResult


class QueuedRanks:
    """Runs the steps of ``ranks`` in order: when they are asked for, or, ``eager``, as soon as they come.

    ``fails``: whether a step fails after it has run, by how many have; those behind it in the queue are not run then.
    """

    def __init__(self, ranks: Ranks, fails: Callable[[int], bool] = lambda call: False, *, eager: bool = False) -> None:
        self._ranks, self._fails, self._eager = ranks, fails, eager
        self.infos = ranks.infos
        self.plans: list[StepPlan] = []
        self.num_ahead = 0
        """Steps that came before the one before them had been collected."""
        self.num_runs = 0
        self._waiting: list[StepPlan] = []
        self._ran: list[StepResult | StepFailedError] = []

    def step(self, plan: StepPlan) -> StepResult:
        self.submit(plan)
        return self.collect(plan)

    def submit(self, plan: StepPlan) -> None:
        self.num_ahead += bool(self._waiting)
        self.plans.append(plan)
        self._waiting.append(plan)
        assert len(self._waiting) <= 2
        if self._eager:
            self._ran.append(self._run(plan))

    def collect(self, plan: StepPlan) -> StepResult:
        assert plan is self._waiting.pop(0)
        found = self._ran.pop(0) if self._eager else self._run(plan)
        if isinstance(found, StepFailedError):
            raise found
        return found

    def _run(self, plan: StepPlan) -> StepResult | StepFailedError:
        if any(isinstance(found, StepFailedError) for found in self._ran):
            return StepFailedError("a step before this one has failed")
        self.num_runs += 1
        try:
            result = self._ranks.step(plan)
        except StepFailedError as error:
            return error
        return StepFailedError("planted") if self._fails(self.num_runs) else result

    def recover(self, generation: int) -> Sequence[Replacement]:
        self._waiting.clear()
        self._ran.clear()
        return self._ranks.recover(generation)

    def close(self) -> None:
        self._ranks.close()
