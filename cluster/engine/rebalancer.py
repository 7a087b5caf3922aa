"""Moves experts between ranks while they serve: count, decide, send, switch.

Ranks count which experts rows choose. Every so many steps a thread of its own looks for moves that even out what ranks
have to do; the engine's never waits for it. Experts then travel from rank to rank within steps, so many bytes in each.
When a batch has reached everybody, the next plan names the placement that holds from then on, and all ranks switch at
its start.

A switch that a plan has named is never taken back: whoever has the plan has all that it takes, and a rank that is
replaced loads what the plan says. Anything before that leaves no trace when it is given up.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from ...router.moves import Move
from ...router.placement import Placement, PlacementVersion
from ...router.rebalance import imbalance, rank_loads, rebalancing_moves
from ...workers.plan import StepPlan, StepResult
from ...workers.rebalance_plan import RebalancePlan
from ..config import EngineConfig
from .balance import Balance
from .events import FINISHED, INTERRUPTED, REBALANCE, TIMED_OUT, Event, EventLog
from .load_window import LoadWindow
from .move_batch import Changes, MoveBatch
from .ranks import MovableRanks

logger = logging.getLogger(__name__)

_PAUSE_S = 0.001
"""Between two moves that are looked for: while that runs, the engine's thread waits for the interpreter."""


@dataclass(frozen=True, slots=True)
class Found:
    """Moves, those of the layers where they bring most first, and the imbalance of the loads they were found for."""

    moves: list[Move]
    before: float
    after: float


Submit = Callable[[Callable[[], Found]], Future[Found]]


@dataclass(slots=True)
class _Run:
    """One rebalance, from the look at the loads on."""

    found: Future[Found]
    started_s: float
    step_s: float = 0.0
    """Time spent in steps since."""
    has_begun: bool = False
    """Whether ``moves`` have been taken from what was found."""
    moves: deque[Move] = field(default_factory=deque)
    batch: MoveBatch | None = None
    num_bytes: int = 0
    num_experts: int = 0
    layers: set[int] = field(default_factory=set)


class Rebalancer:
    """Belongs to the engine's thread: `amend` each plan, then `commit` its result or `void` it.

    ``submit`` has something run elsewhere.
    """

    def __init__(
        self,
        config: EngineConfig,
        ranks: MovableRanks,
        events: EventLog,
        *,
        clock: Callable[[], float] = time.monotonic,
        submit: Submit | None = None,
    ) -> None:
        assert ranks.placed is not None, "ranks that hand experts to each other know where they are"
        self._config, self._ranks, self._events, self._clock = config, ranks, events, clock
        self._submit = submit or ThreadPoolExecutor(1, thread_name_prefix="penstock-rebalance").submit
        self._window = LoadWindow(config.eplb_window_size)
        self._sizes = ranks.infos[0].bytes_per_expert
        self._last_number = ranks.placed.number
        self._num_steps = 0
        """Since the last rebalance."""
        self._last_s = clock()
        self._run: _Run | None = None

    @property
    def is_running(self) -> bool:
        """Whether a rebalance is under way, so that a plan's part in it depends on the result of the one before."""
        return self._run is not None

    def amend(self, plan: StepPlan) -> StepPlan:
        """Return ``plan`` with the step's part in a rebalance."""
        run, changes, transfers, staging = self._run, {}, [], 0
        if run is not None:
            if not run.has_begun and run.found.done():
                self._begin(run)
            if run.batch is not None and run.batch.is_complete:
                changes = self._switch(run, run.batch)
            if run.batch is not None:
                transfers, staging = run.batch.send(), run.batch.number
        placed = self._placed()
        part = RebalancePlan(placed.number, changes, staging, transfers, self._window.ask())
        return replace(plan, ranks=[replace(rank, rebalance=part) for rank in plan.ranks])

    def commit(self, result: StepResult) -> None:
        """Take what every rank has answered."""
        self._window.add(result)
        self._num_steps += 1
        run = self._run
        if run is None:
            loads = self._window.chosen() if self._num_steps >= self._config.eplb_step_interval else None
            if loads is not None:
                self._start(loads)
            return
        run.step_s += result.wall_s
        if run.has_begun and run.batch is None:
            self._end(run, FINISHED)
        elif run.step_s > self._config.eplb_timeout_s:
            self._end(run, TIMED_OUT)

    def void(self) -> None:
        """Drop what is not everywhere: the ranks meet again, and some may be others."""
        self._window.void()
        run, self._run = self._run, None
        if run is not None and run.has_begun:
            self._end(run, FINISHED if run.batch is None else INTERRUPTED)

    def balance(self) -> Balance:
        """Return what is known now."""
        return Balance(self._clock() - self._last_s, self._window.imbalance())

    def _placed(self) -> PlacementVersion:
        assert self._ranks.placed is not None, "it was there at first"
        return self._ranks.placed

    def _start(self, loads: np.ndarray) -> None:
        placement = self._placed().placement
        self._run = _Run(self._submit(lambda: find_moves(placement, loads)), self._clock())

    def _begin(self, run: _Run) -> None:
        """Begin with what was found."""
        error = run.found.exception()
        if error is not None:  # a mistake of ours, which serving does not depend on
            logger.error("no moves could be found", exc_info=error)
            self._run, self._num_steps = None, 0
            return
        run.has_begun = True
        run.moves = deque(run.found.result().moves)
        self._next_batch(run)

    def _next_batch(self, run: _Run) -> None:
        run.batch = None
        if run.moves:
            self._last_number += 1
            run.batch = MoveBatch(
                self._last_number,
                self._placed().placement,
                run.moves,
                self._sizes,
                self._config.eplb_bytes_per_step,
            )

    def _switch(self, run: _Run, batch: MoveBatch) -> Changes:
        """Have a batch take effect with the plan that is made, and begin with the next."""
        self._ranks.placed = PlacementVersion(batch.number, self._placed().placement.moved(batch.changes))
        run.num_bytes += batch.num_bytes
        run.num_experts += batch.num_experts
        run.layers |= batch.changes.keys()
        self._next_batch(run)
        return batch.changes

    def _end(self, run: _Run, what: str) -> None:
        self._run, self._num_steps = None, 0
        now = self._clock()
        if what == FINISHED:
            self._last_s = now
            if not run.num_experts:
                return
        message = "no moves were found in time"
        if run.has_begun:
            found = run.found.result()
            message = (
                f"{run.num_experts} of {sum(len(move.changes) for move in found.moves)} experts have moved, in "
                f"{len(run.layers)} layers; all would bring the busiest rank's rows over the mean from "
                f"{found.before:.2f} to {found.after:.2f}"
            )
        self._events.record(
            Event(
                REBALANCE,
                what,
                message,
                duration_s=now - run.started_s,
                expert_bytes_loaded=run.num_bytes,
                num_experts_moved=run.num_experts,
            )
        )


def find_moves(placement: Placement, loads: np.ndarray) -> Found:
    """Return the moves that even out ``loads`` [R, L, E]; takes a while, and mostly sleeps where it can."""
    before = rank_loads(placement, loads)
    excess = (before.max(axis=1) - before.mean(axis=1)).tolist()
    moves = []
    moved = placement
    for move in rebalancing_moves(placement, loads):
        moves.append(move)
        moved = moved.moved({move.layer: move.applied(moved.holders[move.layer])})
        time.sleep(_PAUSE_S)
    moves.sort(key=lambda move: -excess[move.layer])
    return Found(moves, imbalance(before), imbalance(rank_loads(moved, loads)))
