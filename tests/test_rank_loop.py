"""A rank's loop, over a real step plane: what it launches behind what, and when it answers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from penstock.cluster.config import EngineConfig
from penstock.workers.plan import Bucket, RankPlan
from penstock.workers.process_group import StoreAddress

from .step_plane import (
    Close,
    CoordinatorPlane,
    Done,
    EchoRunner,
    Failed,
    Loaded,
    Ping,
    Pong,
    RankLoop,
    RankSettings,
    Regroup,
    Run,
    answer,
)

BUCKET = Bucket(2, 1, 256)


@dataclass(slots=True)
class Step:
    plan: RankPlan
    ended: threading.Event = field(default_factory=threading.Event)

    def has_ended(self) -> bool:
        return self.ended.is_set()


class DeviceRunner(EchoRunner):
    """Its device ends steps when the test says so; ``fails``: how a step fails, by its number."""

    def __init__(self, fails: dict[int, str]) -> None:
        super().__init__(EngineConfig(model="m"), 0, None, None)
        self.launched: queue.Queue[tuple[Step, int | None]] = queue.Queue()
        self._fails = fails

    def can_follow(self, plan: RankPlan, running: Any) -> bool:
        return self.can_be_followed(running) and plan.bucket is not None

    def can_be_followed(self, running: Any) -> bool:
        return running.plan.bucket is not None

    def launch(self, plan: RankPlan, behind: Any = None) -> Any:
        if self._fails.get(plan.step_id) == "launch":
            raise RuntimeError("planted")
        step = Step(plan)
        self.launched.put((step, None if behind is None else behind.plan.step_id))
        return step

    def finish(self, step: Any) -> Any:
        assert step.ended.wait(20)
        if self._fails.get(step.plan.step_id) == "finish":
            raise RuntimeError("planted")
        return answer(step.plan, self.rank)


class Gang:
    """One rank's loop in a thread, and the coordinator's end of its socket."""

    def __init__(self, **fails: str) -> None:
        self.runner = DeviceRunner({int(name.removeprefix("step")): how for name, how in fails.items()})
        self.plane = CoordinatorPlane("127.0.0.1")
        settings = RankSettings(EngineConfig(model="m", num_threads=1), self.plane.admit("rank"), "127.0.0.1", 0)
        loop = RankLoop(lambda *_: self.runner)  # type: ignore[arg-type, return-value]
        self.thread = threading.Thread(target=loop.serve, args=(settings,))
        self.thread.start()
        assert isinstance(self.heard(), Loaded)

    def run(self, number: int, *, generation: int = 0, padded: bool = True) -> None:
        self.plane.send("rank", Run(RankPlan(generation, number, BUCKET if padded else None)))

    def launched(self, number: int, behind: int | None) -> Step:
        step, found = self.runner.launched.get(timeout=20)
        assert (step.plan.step_id, found) == (number, behind)
        return step

    def heard(self) -> Any:
        received = self.plane.receive(20)
        assert received is not None
        return received[1]

    def hears(self, kind: type, number: int) -> None:
        found = self.heard()
        assert isinstance(found, kind), found
        said = found.result if isinstance(found, Done) else found.error
        assert said.step_id == number

    def is_silent(self) -> bool:
        return self.plane.receive(0.05) is None and self.runner.launched.empty()

    def close(self) -> None:
        self.plane.send("rank", Close())
        self.thread.join(20)
        self.plane.close()
        assert not self.thread.is_alive()


@pytest.fixture
def gang() -> Iterator[Callable[..., Gang]]:
    made: list[Gang] = []

    def make(**fails: str) -> Gang:
        made.append(Gang(**fails))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_rank_launches_one_step_behind_the_one_that_runs(gang: Callable[..., Gang]) -> None:
    rank = gang()
    rank.run(1)
    first = rank.launched(1, None)
    rank.run(2)
    second = rank.launched(2, 1)
    rank.run(3)
    assert rank.is_silent(), "at most one, and neither has ended"
    first.ended.set()
    rank.hears(Done, 1)
    third = rank.launched(3, 2)
    second.ended.set()
    rank.hears(Done, 2)
    third.ended.set()
    rank.hears(Done, 3)
    rank.run(4)
    last = rank.launched(4, None)
    last.ended.set()
    rank.hears(Done, 4)


def test_a_step_that_cannot_follow_waits_for_the_answer(gang: Callable[..., Gang]) -> None:
    rank = gang()
    rank.run(1)
    first = rank.launched(1, None)
    rank.run(2, padded=False)
    assert rank.is_silent()
    first.ended.set()
    rank.hears(Done, 1)
    second = rank.launched(2, None)
    rank.run(3)
    assert rank.is_silent()
    second.ended.set()
    rank.hears(Done, 2)
    rank.launched(3, None).ended.set()
    rank.hears(Done, 3)


def test_what_is_launched_behind_a_step_that_fails_is_void(gang: Callable[..., Gang]) -> None:
    rank = gang(step1="finish", step13="launch")
    rank.run(1)
    first = rank.launched(1, None)
    rank.run(2)
    rank.launched(2, 1)
    first.ended.set()
    rank.hears(Failed, 1)
    rank.hears(Failed, 2)  # its device need not have ended
    rank.run(3)
    rank.hears(Failed, 3)
    rank.run(11, generation=1)
    rank.launched(11, None).ended.set()
    rank.hears(Done, 11)
    # One that cannot be launched leaves the one before as it is
    rank.run(12, generation=1)
    twelfth = rank.launched(12, None)
    rank.run(13, generation=1)
    assert rank.is_silent()
    twelfth.ended.set()
    rank.hears(Done, 12)
    rank.hears(Failed, 13)
    rank.run(14, generation=1)
    rank.hears(Failed, 14)


def test_pings_are_answered_behind_the_step_that_runs(gang: Callable[..., Gang]) -> None:
    rank = gang()
    rank.run(1)
    first = rank.launched(1, None)
    rank.plane.send("rank", Ping(7))
    assert rank.is_silent()
    first.ended.set()
    rank.hears(Done, 1)
    assert rank.heard() == Pong(7)


def test_ranks_that_meet_again_do_not_wait_for_a_step_that_was_given_up(
    gang: Callable[..., Gang], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo")  # as joining a group would leave it
    rank = gang()
    rank.run(1)
    rank.launched(1, None)
    rank.plane.send("rank", Regroup(1, StoreAddress("127.0.0.1", 9)))
    assert rank.heard().error is not None, "there is no store, but it has gone there"
    rank.run(2, generation=1)
    rank.launched(2, None).ended.set()
    rank.hears(Done, 2)
