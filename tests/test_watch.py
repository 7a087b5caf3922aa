"""What a coordinator hears of a gang's processes, over a real step plane, and which it takes for lost."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.events import DIED, EventLog
from penstock.cluster.transport.curve import LOOPBACK, Ticket
from penstock.cluster.transport.roster import Roster
from penstock.cluster.transport.step_plane import CoordinatorPlane
from penstock.cluster.transport.watch import Watch


class Ending:
    """A process that is noticed to have ended as soon as somebody looks."""

    def __init__(self) -> None:
        self.num_kills = 0

    def ended(self) -> str:
        return "ended with exit code 1"

    def kill(self) -> None:
        self.num_kills += 1


class Gang:
    def __init__(self, num_spares: int) -> None:
        self.processes: list[Ending] = []
        self.plane, self.events = CoordinatorPlane(LOOPBACK), EventLog()
        self.roster = Roster(self.plane, self._launch)
        self.watch = Watch(EngineConfig(model="m", expert_parallel_size=2), self.plane, self.roster, self.events)
        for rank in (0, 1, *[None] * num_spares):
            self.roster.start(rank)

    def _launch(self, ticket: Ticket, rank: int | None) -> Ending:
        self.processes.append(Ending())
        return self.processes[-1]


@pytest.fixture
def gang() -> Iterator[Gang]:
    gang = Gang(num_spares=1)
    yield gang
    gang.plane.close()


def test_a_process_that_ends_as_its_deadline_passes_is_lost_once(gang: Gang) -> None:
    spare = gang.roster.spares[0]
    assert gang.watch.collect([0, 1], lambda member, answer: answer, lambda: 0.0) == {}
    assert sorted(gang.watch.lost) == [0, 1]
    gang.watch.lose(spare, "silent", "a spare did not answer", time.monotonic())
    assert gang.watch.num_spares_lost == 1
    assert [event.what for event in gang.events.events()] == [DIED] * 3
    assert [process.num_kills for process in gang.processes] == [1, 1, 1]
