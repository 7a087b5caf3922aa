"""The course of a rebalance: a budget of bytes a step, switches when all has arrived, and every way that it may end."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.events import FINISHED, INTERRUPTED, REBALANCE, TIMED_OUT, Event, EventLog
from penstock.cluster.engine.load_window import LoadWindow
from penstock.cluster.engine.rebalancer import Found, Rebalancer, find_moves
from penstock.router.placement import Placement, PlacementVersion, contiguous
from penstock.router.rebalance import imbalance, rank_loads
from penstock.workers.plan import LayerCounts, RankPlan, RankResult, StepPlan, StepResult
from penstock.workers.rebalance_plan import ExpertLoads, RebalancePlan

R, L, E, SIZE = 3, 2, 9, 100
HOT = np.array([[90, 80, 70, 5, 5, 5, 5, 5, 5], [5, 5, 5, 5, 5, 5, 50, 60, 70]])
"""[L, E] rows of each rank that choose each expert in a step: each layer has its rank with all that is hot."""


def now(find: Callable[[], Found]) -> Future[Found]:
    """Find at once."""
    future: Future[Found] = Future()
    try:
        future.set_result(find())
    except Exception as error:
        future.set_exception(error)
    return future


class Gang:
    """A rebalancer, and ranks that do what they are told and check that it can be done."""

    def __init__(self, submit: Callable[..., Future[Found]] = now, wall_s: float = 0.1, **options: object) -> None:
        options = {"eplb_window_size": 4, "eplb_step_interval": 4, "eplb_bytes_per_step": 150, **options}
        config = EngineConfig(model="m", expert_parallel_size=R, enable_eplb=True, **options)  # type: ignore[arg-type]
        self.budget, self.wall_s = config.eplb_bytes_per_step, wall_s
        self.placed: PlacementVersion | None = PlacementVersion(0, contiguous(L, E, R))
        self.infos = [SimpleNamespace(bytes_per_expert=[SIZE] * L)] * R
        self.time_s, self.loads, self.events = 0.0, HOT, EventLog()
        self.rebalancer = Rebalancer(config, self, self.events, clock=lambda: self.time_s, submit=submit)  # type: ignore[arg-type]
        self.held = self.placement
        """What ranks serve."""
        self.arrived: dict[tuple[int, int, int], int] = {}
        self.moved_bytes: list[int] = []
        """The most that reached or left a rank, by step."""
        self.switches = 0

    @property
    def placement(self) -> Placement:
        assert self.placed is not None
        return self.placed.placement

    def plan(self) -> RebalancePlan:
        parts = [RankPlan(0, 0, 1) for _ in range(R)]
        amended = self.rebalancer.amend(StepPlan(0, 0, parts))
        (part,) = {id(rank.rebalance): rank.rebalance for rank in amended.ranks}.values()
        assert part is not None, "and the same for all"
        return part

    def step(self) -> RebalancePlan:
        """Plan a step, run it and commit it."""
        part = self.plan()
        self.obey(part)
        self.time_s += self.wall_s
        loads = ExpertLoads(self.loads.tolist(), [0] * L) if part.wants_loads else None
        results = [
            RankResult(0, 0, rank, [], LayerCounts([], [], [], [], []), 0, 0, 0.0, 0.0, expert_loads=loads)
            for rank in range(R)
        ]
        self.rebalancer.commit(StepResult(results, self.wall_s))
        return part

    def obey(self, part: RebalancePlan) -> None:
        if part.changes:
            self.switches += 1
            before, self.held = self.held, self.held.moved(part.changes)
            for layer in range(L):
                for rank in range(R):
                    for expert in set(self.held.experts_of(layer, rank)) - set(before.experts_of(layer, rank)):
                        assert self.arrived.pop((layer, expert, rank)) == SIZE, "all of it"
            assert Placement(E, R, self.held.holders) == self.held
        assert self.placed == PlacementVersion(part.version, self.held)
        reaching, leaving = np.zeros(R, dtype=int), np.zeros(R, dtype=int)
        for transfer in part.transfers:
            key = transfer.layer, transfer.expert, transfer.target
            assert transfer.source in self.held.holders[transfer.layer][transfer.expert]
            assert self.arrived.get(key, 0) == transfer.start < transfer.stop <= SIZE
            self.arrived[key] = transfer.stop
            reaching[transfer.target] += transfer.stop - transfer.start
            leaving[transfer.source] += transfer.stop - transfer.start
        self.moved_bytes.append(int(max(reaching.max(), leaving.max())))

    def until(self, condition: Callable[[RebalancePlan], bool]) -> RebalancePlan:
        for _ in range(500):
            part = self.step()
            if condition(part):
                return part
        raise AssertionError("it never came to that")

    def rebalances(self) -> list[Event]:
        return [event for event in self.events.events() if event.kind == REBALANCE]


def loads_of(gang: Gang) -> np.ndarray:
    return rank_loads(gang.placement, np.broadcast_to(HOT, (R, L, E)))


@pytest.mark.parametrize("budget", [7, 100, 250, 10_000])
def test_a_rebalance_keeps_to_its_budget_and_evens_out_the_work(budget: int) -> None:
    gang = Gang(eplb_bytes_per_step=budget)
    start = gang.placement
    assert imbalance(loads_of(gang)) > 1.7
    for _ in range(4):
        assert gang.step().transfers == [], "there is nothing to go by before the interval is over"
    gang.until(lambda _: bool(gang.rebalances()))
    assert imbalance(loads_of(gang)) < 1.13, "three experts a rank cannot be more even"
    assert 0 < max(gang.moved_bytes) <= budget
    (event,) = gang.rebalances()
    moved = sum(
        len(set(gang.placement.experts_of(layer, rank)) - set(start.experts_of(layer, rank)))
        for layer in range(L)
        for rank in range(R)
    )
    assert (event.what, event.num_experts_moved, event.expert_bytes_loaded) == (FINISHED, moved, moved * SIZE)
    assert event.duration_s == pytest.approx(gang.time_s - 0.4)
    totals = gang.events.totals()
    assert (totals.rebalances, totals.expert_bytes_moved, totals.num_experts_moved) == (
        {FINISHED: 1},
        moved * SIZE,
        moved,
    )
    assert totals.expert_bytes_loaded == 0, "that is what recoveries load"
    assert gang.switches > 1 if budget < 200 else gang.switches >= 1
    # What is even stays as it is, and has been looked at
    placed = gang.placed
    for _ in range(12):
        gang.step()
    assert gang.placed == placed
    assert len(gang.rebalances()) == 1
    assert gang.rebalancer.balance().last_rebalance_age_s < 0.5


def test_the_engine_never_waits_for_the_search() -> None:
    pending: list[Future[Found]] = []

    def later(find: Callable[[], Found]) -> Future[Found]:
        pending.append(Future())
        return pending[-1]

    gang = Gang(later)
    for _ in range(20):
        assert gang.step().transfers == []
    (future,) = pending
    future.set_result(find_moves(gang.placement, np.broadcast_to(HOT, (R, L, E))))
    assert gang.step().transfers


def test_one_that_takes_too_long_is_given_up_and_leaves_a_whole_placement() -> None:
    gang = Gang(eplb_bytes_per_step=10, eplb_timeout_s=2.0)
    gang.until(lambda _: bool(gang.rebalances()))
    (event,) = gang.rebalances()
    assert event.what == TIMED_OUT
    assert 2.0 < event.duration_s < 2.5
    assert 0 < event.num_experts_moved < len(find_moves(contiguous(L, E, R), np.broadcast_to(HOT, (R, L, E))).moves) * 2
    assert gang.plan().transfers == []
    assert gang.held == gang.placement
    assert gang.rebalancer.balance().last_rebalance_age_s == pytest.approx(gang.time_s), "it has not finished"
    gang.arrived.clear()  # what was on its way comes anew
    gang.until(lambda part: bool(part.changes))


def test_a_search_that_fails_or_never_ends_leaves_experts_where_they_are(caplog: pytest.LogCaptureFixture) -> None:
    def broken(find: Callable[[], Found]) -> Future[Found]:
        return now(lambda: 1 // 0)  # type: ignore[arg-type, return-value]

    gang = Gang(broken)
    for _ in range(12):
        assert gang.step().transfers == []
    assert "ZeroDivisionError" in caplog.text
    assert gang.rebalancer.balance().last_rebalance_age_s == pytest.approx(gang.time_s), "nothing was found even"
    gang = Gang(lambda _: Future(), eplb_timeout_s=1.0)
    gang.until(lambda _: bool(gang.rebalances()))
    assert gang.rebalances()[0].what == TIMED_OUT
    assert gang.placement == contiguous(L, E, R)


def test_a_fault_in_the_middle_drops_what_is_on_its_way() -> None:
    gang = Gang(eplb_bytes_per_step=30)
    gang.until(lambda part: bool(part.transfers))
    before = gang.placed
    gang.plan()  # of a step that fails
    gang.rebalancer.void()
    gang.arrived.clear()
    assert gang.placed == before, "nothing had been switched"
    (event,) = gang.rebalances()
    assert (event.what, event.num_experts_moved, event.expert_bytes_loaded) == (INTERRUPTED, 0, 0)
    part = gang.until(lambda part: bool(part.transfers))
    assert part.staging == 2, "a version's number stands for one placement"
    gang.until(lambda _: len(gang.rebalances()) == 2)
    assert imbalance(loads_of(gang)) < 1.13, "three experts a rank cannot be more even"


def test_a_switch_that_a_plan_has_named_stays_though_its_step_fails() -> None:
    gang = Gang(eplb_bytes_per_step=10_000)
    gang.until(lambda part: bool(part.transfers))
    part = gang.plan()
    assert part.changes
    gang.rebalancer.void()
    assert gang.placed is not None
    assert gang.placed.number == part.version == 1
    assert imbalance(loads_of(gang)) < 1.13, "three experts a rank cannot be more even"
    assert [event.what for event in gang.rebalances()] == [FINISHED]


def test_ranks_are_asked_once_where_the_next_step_is_planned_before_they_answer() -> None:
    gang = Gang(eplb_window_size=64, eplb_step_interval=1000)
    asked = [gang.plan().wants_loads]

    def commit() -> None:
        loads = ExpertLoads(HOT.tolist(), [0] * L) if asked[-2] else None
        empty = RankResult(0, 0, 0, [], LayerCounts([], [], [], [], []), 0, 0, 0.0, 0.0, expert_loads=loads)
        gang.rebalancer.commit(StepResult([empty] * R, 0.1))

    for _ in range(20):
        asked.append(gang.plan().wants_loads)
        commit()
    assert asked == [*[False] * 3, True] * 5 + [False], "as often as by turns"
    asked.append(gang.plan().wants_loads)
    while not asked[-1]:
        commit()
        asked.append(gang.plan().wants_loads)
    gang.rebalancer.void()
    assert [gang.plan().wants_loads for _ in range(2)] == [False, True], "two of four steps have been committed"


def test_a_window_keeps_the_last_steps() -> None:
    def result(number: int | None) -> StepResult:
        loads = None if number is None else ExpertLoads([[number, 0]], [number])
        other = None if number is None else ExpertLoads([[0, 0]], [0])
        empty = RankResult(0, 0, 0, [], LayerCounts([], [], [], [], []), 0, 0, 0.0, 0.0)
        return StepResult([replace(empty, expert_loads=loads), replace(empty, expert_loads=other)], 0.0)

    window = LoadWindow(32)
    assert window.chosen() is None
    assert window.imbalance() is None
    asked = []
    for step in range(100):
        asked.append(window.ask())
        window.add(result(step if asked[-1] else None))
    assert asked == [False, True] * 50, "one step in a sixteenth of the window"
    chosen = window.chosen()
    assert chosen is not None
    assert chosen.tolist() == [[[sum(range(69, 100, 2)), 0]], [[0, 0]]]
    assert window.imbalance() == 2.0
