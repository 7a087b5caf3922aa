"""One step after another, from plan to result: the next one is sent while one runs, where its tokens are not needed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ...router.expert_budget import ExpertBudget
from ...workers.plan import Bucket, RankPlan, StepFailedError, StepPlan, StepRefusedError, StepResult
from ..config import EngineConfig
from ..speculation.batch import Batch
from .backend import EngineDeadError
from .events import RECOVERY, Event, EventLog
from .foresight import foreseen, is_foreseeable
from .proposer import Proposer
from .ranks import QueueingRanks, Ranks
from .rebalancer import Rebalancer
from .request import Request
from .scheduler import Scheduler
from .stats import Counters

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class PlannedStep:
    """A step that ranks have, or are about to get."""

    plan: StepPlan
    started_s: float
    """When its planning began, or, if it was sent ahead, when the result of the step before came; engine's clock."""
    batch: Batch | None = None
    """What was foreseen of a step that was sent ahead: the controller has yet to be asked, as for any other."""


@dataclass(frozen=True, slots=True)
class RanStep:
    """A step that every rank has answered."""

    plan: StepPlan
    result: StepResult
    started_s: float
    was_ahead: bool
    waited_s: float | None
    """How long ranks had nothing to do since the result of the step before, if that was right before and they can be
    sent steps while they run others."""


class Stepper:
    """Plans steps over ``scheduler`` and has ``ranks`` run them; ``requests``: those that live, by key.

    Between two calls at most one step is under way. Ranks run steps in the order in which they were sent, so blocks
    that a request leaves behind go to another at once: that one writes to them in a later step than any under way.
    """

    def __init__(
        self,
        config: EngineConfig,
        ranks: Ranks,
        scheduler: Scheduler,
        proposer: Proposer,
        rebalancer: Rebalancer | None,
        requests: Mapping[int, Request],
        counters: Counters,
        events: EventLog,
        clock: Callable[[], float],
    ) -> None:
        self._max_retries = config.max_step_retries
        self._ranks, self._scheduler, self._proposer, self._rebalancer = ranks, scheduler, proposer, rebalancer
        self._queue = ranks if config.async_scheduling and isinstance(ranks, QueueingRanks) else None
        self._requests, self._counters, self._events, self._clock = requests, counters, events, clock
        self._generation = 0
        self._step_id = 0
        self._failures_in_row = 0
        self._must_recover = False
        self._ahead: PlannedStep | None = None
        self._ended_s: float | None = None
        """When ranks had run the step before, if no moment without one came since."""

    @property
    def is_under_way(self) -> bool:
        """Whether ranks run a step that nobody has waited for yet."""
        return self._ahead is not None

    def step(self) -> RanStep | None:
        """Wait for the step that is under way, or plan one; before that, send the one after it if that can be.

        Returns None when there is nothing to run or the step failed. Raises ``EngineDeadError`` after
        ``max_step_retries`` failures in a row.
        """
        if self._must_recover:
            self._recover()
        try:
            step = self._next()
            if step is None:
                self._ended_s = None
                return None
            ahead = self._send_ahead(step)
            result = self._ranks.step(step.plan) if self._queue is None else self._queue.collect(step.plan)
            _check_lock_step(result)
        except StepFailedError as error:
            self._discard(error)
            return None
        except BaseException:
            # Interrupted: ranks may still answer these steps, so their numbers must not come again
            self._void()
            raise
        before_s, ended_s = self._ended_s, self._clock()
        waited_s = None
        if before_s is not None and self._queue is not None:
            waited_s = ended_s - before_s - max(rank.ran_s for rank in result.ranks)
        self._ahead, self._ended_s = ahead, ended_s
        if ahead is not None:
            ahead.started_s = ended_s
        self._step_id += 1
        self._failures_in_row = 0
        if self._rebalancer is not None:
            self._rebalancer.commit(result)
        return RanStep(step.plan, result, step.started_s, step.batch is not None, waited_s)

    def run_padding(self, bucket: Bucket, budget: ExpertBudget | None) -> StepResult | None:
        """Run a step of nothing but padding, on all ranks; None if it failed. Raises as `step` does.

        It counts nowhere but as a failed step if it fails.
        """
        assert self._ahead is None, "nothing runs"
        if self._must_recover:
            self._recover()
        header = self._generation, self._step_id
        plan = StepPlan(*header, [RankPlan(*header, bucket, budget=budget) for _ in self._ranks.infos])
        try:
            result = self._ranks.step(plan)
            _check_lock_step(result)
        except StepFailedError as error:
            self._discard(error)
            return None
        self._step_id += 1
        self._failures_in_row = 0
        return result

    def recover(self) -> None:
        """Bring the ranks back together between steps; for a caller that knows that one is lost."""
        self._void()
        self._recover()

    def _next(self) -> PlannedStep | None:
        step, self._ahead = self._ahead, None
        if step is not None:
            assert step.batch is not None, "it was sent ahead"
            self._proposer.propose_nothing(step.batch)
            return step
        self._admit()
        started_s = self._clock()
        drafts, budget, reach = self._proposer.propose()
        plan = self._scheduler.schedule(self._generation, self._step_id, drafts, budget, reach)
        if plan is None:
            return None
        return self._sent(PlannedStep(plan, started_s))

    def _send_ahead(self, step: PlannedStep) -> PlannedStep | None:
        """Plan and send the step after ``step``, if nothing of it depends on what that one yields.

        Nor on blocks that are not free yet: who is to lose its own is decided when nothing runs. While experts move,
        plans carry on from results.
        """
        if self._queue is None or not is_foreseeable(step.plan, self._requests):
            return None
        if self._rebalancer is not None and self._rebalancer.is_running:
            return None
        with foreseen(step.plan, self._requests):
            batch = self._proposer.foresee()
            if batch is None or not self._scheduler.can_grow():
                return None
            self._admit()
            batch = replace(batch, prompt_rows=self._scheduler.prompt_rows())
            plan = self._scheduler.schedule(self._generation, self._step_id + 1, {})
        return None if plan is None else self._sent(PlannedStep(plan, step.started_s, batch))

    def _sent(self, step: PlannedStep) -> PlannedStep:
        if self._rebalancer is not None:
            step.plan = self._rebalancer.amend(step.plan)
        if self._queue is not None:
            self._queue.submit(step.plan)
        return step

    def _admit(self) -> None:
        now = self._clock()
        for request in self._scheduler.admit():
            if request.admitted_s is None:
                request.admitted_s = now
                self._counters.latencies.admitted(request, now)

    def _discard(self, error: StepFailedError) -> None:
        if isinstance(error, StepRefusedError):
            logger.info("step %d of generation %d waits: %s", self._step_id, self._generation, error)
            self._void()
            return
        self._counters.num_failed_steps += 1
        self._failures_in_row += 1
        logger.warning("step %d of generation %d discarded: %s", self._step_id, self._generation, error)
        self._void()
        if self._failures_in_row > self._max_retries:
            raise EngineDeadError(f"step {self._step_id} failed {self._failures_in_row} times in a row: {error}")

    def _void(self) -> None:
        """Nothing of the steps under way counts; the next one starts by bringing the ranks back together."""
        self._generation += 1
        self._ahead = self._ended_s = None
        self._scheduler.forget_ranks()
        if self._rebalancer is not None:
            self._rebalancer.void()
        self._must_recover = True

    def _recover(self) -> None:
        """Requests of ranks that kept their KV go on; those of ranks that were lost are replayed."""
        started = time.monotonic()
        replaced = self._ranks.recover(self._generation)
        self._must_recover = False
        if not replaced:
            return
        infos = self._ranks.infos
        num_replayed = sum(
            self._scheduler.lose_kv(lost.rank, 0 if lost.is_absent else infos[lost.rank].num_kv_blocks)
            for lost in replaced
        )
        since = min(started, *(lost.lost_s for lost in replaced))
        lost_ranks = tuple(sorted(lost.rank for lost in replaced))
        there = [lost for lost in replaced if not lost.is_absent]
        self._events.record(
            Event(
                RECOVERY,
                replaced[0].what,
                f"rank {', '.join(map(str, lost_ranks))} is there again, "
                f"{sum(lost.was_spare for lost in replaced)} from spares"
                if there
                else f"the others go on without rank {', '.join(map(str, lost_ranks))}",
                duration_s=time.monotonic() - since,
                generation=self._generation,
                ranks=lost_ranks,
                expert_bytes_loaded=sum(infos[lost.rank].expert_bytes for lost in there),
                num_requests_replayed=num_replayed,
            )
        )


def _check_lock_step(result: StepResult) -> None:
    """Ranks whose sequences of collectives differ may have mixed their data: nothing of the step can be trusted."""
    if len({(r.num_collectives, r.collectives_crc) for r in result.ranks}) > 1:
        raise StepFailedError("ranks ran different sequences of collectives")
