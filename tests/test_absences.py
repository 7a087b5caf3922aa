"""Ranks that the others go on without, whose replacements fail: over a real step plane, with threads as processes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from penstock.benchmarks.echo_rank import EchoRunner
from penstock.cluster.config import EngineConfig
from penstock.cluster.transport.curve import LOOPBACK
from penstock.cluster.transport.messages import Loaded, Regroup, Regrouped
from penstock.cluster.transport.rank_loop import RankSettings
from penstock.cluster.transport.remote_ranks import RemoteRanks
from penstock.cluster.transport.step_plane import RankPlane
from penstock.router.placement import Placement

LOST = 1
BOTH_HOLD_ALL = Placement(4, 2, (((0, 1),) * 4,))
CONFIG = EngineConfig(model="m", expert_parallel_size=2)


class Process:
    """One that loads and meets others, if it ``starts``."""

    def __init__(self, settings: RankSettings, *, starts: bool) -> None:
        self.end: str | None = None
        self._settings = settings
        self._killed = threading.Event()
        self.thread = threading.Thread(target=self._run)
        if starts:
            self.thread.start()

    def ended(self) -> str | None:
        return self.end

    def kill(self) -> None:
        self._killed.set()

    def _run(self) -> None:
        plane = RankPlane(self._settings.ticket)
        assert self._settings.rank is not None
        plane.send(Loaded(EchoRunner(CONFIG, self._settings.rank, None, None).info))
        while isinstance(command := plane.receive(self._killed.is_set), Regroup):
            plane.send(Regrouped(command.epoch))
        plane.close()


class Gang:
    def __init__(self) -> None:
        self.processes: list[Process] = []
        self.can_start = True
        self.ranks = RemoteRanks(CONFIG, LOOPBACK, self._launch, BOTH_HOLD_ALL, node=LOOPBACK)
        self.ranks.start()

    def _launch(self, settings: RankSettings) -> Process:
        self.processes.append(Process(settings, starts=self.can_start))
        return self.processes[-1]

    def lose(self) -> bool:
        """Lose the present process of the rank; return whether the others go on without it."""
        self.processes[-1].end = "ended with exit code 1"
        assert self.ranks.tend(ping=False)
        (lost,) = self.ranks.recover(1)
        assert lost.rank == LOST
        return lost.is_absent


@pytest.fixture
def gang() -> Iterator[Gang]:
    gang = Gang()
    yield gang
    gang.ranks.close()
    for process in gang.processes:
        process.kill()
        if process.thread.ident is not None:
            process.thread.join(20)


def test_the_others_wait_for_a_rank_whose_replacements_fail_until_one_has_come(gang: Gang) -> None:
    gang.can_start = False
    assert all(gang.lose() for _ in range(5))
    gang.can_start = True
    assert not gang.lose(), "it is waited for"
    assert gang.lose(), "as one has come"
