"""Processes of a gang over a real step plane: fencing, spares that never get ready."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.backend import EngineDeadError
from penstock.cluster.transport.curve import LOOPBACK
from penstock.cluster.transport.messages import Close, Ready
from penstock.cluster.transport.rank_loop import RankSettings
from penstock.cluster.transport.remote_ranks import RemoteRanks
from penstock.cluster.transport.roster import Roster
from penstock.cluster.transport.step_plane import CoordinatorPlane, RankPlane


@dataclass
class Process:
    """No process at all: it is what a test says."""

    settings: object
    end: str | None = None
    killed: int = 0

    def ended(self) -> str | None:
        return self.end

    def kill(self) -> None:
        self.killed += 1


@dataclass
class Launcher:
    end: str | None = None
    launched: list[Process] = field(default_factory=list)

    def __call__(self, settings: RankSettings) -> Process:
        self.launched.append(Process(settings, self.end))
        return self.launched[-1]


def receive(plane: CoordinatorPlane) -> tuple[str, object] | None:
    deadline = time.monotonic() + 20
    while (received := plane.receive(0.05)) is None and time.monotonic() < deadline:
        pass
    return received


def command(plane: RankPlane) -> object | None:
    deadline = time.monotonic() + 20
    return plane.receive(lambda: time.monotonic() > deadline)


def test_a_fenced_process_is_not_heard_and_told_to_close() -> None:
    plane = CoordinatorPlane(LOOPBACK)
    roster = Roster(plane, lambda ticket, rank: Process(ticket))
    stale, other = roster.start(1), roster.start(None)
    ends = [RankPlane(member.process.settings) for member in (stale, other)]  # type: ignore[attr-defined]
    for end in ends:
        end.send(Ready())
    assert {received[0] for received in (receive(plane), receive(plane)) if received} == {stale.name, other.name}
    roster.lose(stale)
    assert list(roster) == [other]
    assert stale.process.killed == 1  # type: ignore[attr-defined]
    assert isinstance(command(ends[0]), Close)
    ends[0].send(Ready())  # it had not heard that yet
    assert plane.receive(20.0) is None
    assert isinstance(command(ends[0]), Close), "it is told once more"
    ends[1].send(Ready())
    assert receive(plane) == (other.name, Ready())
    # Nor may it connect again
    again = RankPlane(stale.process.settings)  # type: ignore[attr-defined]
    again.send(Ready())
    assert plane.receive(0.5) is None
    again.close()
    for end in ends:
        end.close()
    plane.close()


def test_spares_that_never_get_ready_are_not_started_for_ever() -> None:
    launcher = Launcher()
    config = EngineConfig(model="m", expert_parallel_size=2, num_spares=1)
    ranks = RemoteRanks(config, LOOPBACK, launcher, node=LOOPBACK)
    for _ in range(10):
        assert not ranks.tend(ping=False), "no rank is lost"
        launcher.launched[-1].end = "ended with exit code 1"
    assert len(launcher.launched) == 3
    assert len(ranks.events.events()) == 3
    ranks.close()


def test_a_rank_that_ends_before_it_has_loaded_ends_the_start() -> None:
    launcher = Launcher("ended with exit code 3")
    ranks = RemoteRanks(EngineConfig(model="m", expert_parallel_size=2), LOOPBACK, launcher, node=LOOPBACK)
    with pytest.raises(EngineDeadError, match=r"the process of rank [01] ended with exit code 3"):
        ranks.start()
    ranks.close()
