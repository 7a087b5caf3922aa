from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest

from penstock.cluster.engine.backend import EngineDeadError
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.engine_thread import EngineThread
from penstock.cluster.engine.output import ERROR, LENGTH, RequestOutput
from penstock.cluster.engine.ranks import Ranks
from penstock.workers.plan import StepPlan, StepResult

from .queued_ranks import QueuedRanks
from .tiny_engine import GREEDY, PROMPTS, FailingRanks, Published, generate


class _Reader:
    """Collects what an engine thread delivers, and wakes when a request has ended."""

    def __init__(self) -> None:
        self.tokens = Published()
        self._changed = threading.Condition()

    def deliver(self, outputs: list[RequestOutput]) -> None:
        with self._changed:
            self.tokens.take(outputs)
            self._changed.notify_all()

    def wait(self, request_id: str) -> RequestOutput:
        with self._changed:
            ended = self._changed.wait_for(lambda: request_id in self.tokens.ended, timeout=10)
            assert ended, f"request {request_id} never ended"
            return self.tokens.ended[request_id]


def test_the_engine_thread_serves_and_survives_a_refused_request(make_engine: Callable[..., Engine]) -> None:
    expected = generate(make_engine(), [PROMPTS[0]], GREEDY)[0]
    reader = _Reader()
    thread = EngineThread(make_engine(), reader.deliver)
    try:
        with pytest.raises(ValueError, match=r"^prompt: "):
            thread.submit("bad", [], GREEDY)
        # The same id twice while the first is live: whatever becomes of the second, the thread goes on
        hold = threading.Event()
        thread.call(lambda: hold.wait(10))
        thread.submit("a", PROMPTS[0], GREEDY)
        thread.submit("a", PROMPTS[0], GREEDY)
        hold.set()
        thread.submit("b", PROMPTS[0], GREEDY)
        assert reader.wait("b").finish_reason == LENGTH
        assert reader.tokens["b"] == expected
        assert thread.stats().num_requests_running == 0
        thread.check_health()
    finally:
        thread.close()


def test_a_dead_engine_ends_every_request_with_an_error(make_engine: Callable[..., Engine]) -> None:
    reader = _Reader()
    thread = EngineThread(
        make_engine(lambda ranks: FailingRanks(ranks, lambda call: call > 2), max_step_retries=1), reader.deliver
    )
    try:
        hold = threading.Event()
        thread.call(lambda: hold.wait(10))
        for request_id in ("a", "b"):
            thread.submit(request_id, PROMPTS[0], GREEDY)
        hold.set()
        for request_id in ("a", "b"):
            last = reader.wait(request_id)
            assert last.finish_reason == ERROR
            assert "planted" in (last.error or "")
        with pytest.raises(EngineDeadError, match="planted"):
            thread.check_health()
        with pytest.raises(EngineDeadError, match="planted"):
            thread.submit("c", PROMPTS[0], GREEDY)
    finally:
        thread.close()


def test_an_order_that_fails_ends_every_request_with_an_error(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, reader = make_engine(), _Reader()

    def broken(request_id: str, reason: str) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(engine, "abort", broken)
    thread = EngineThread(engine, reader.deliver)
    try:
        hold = threading.Event()
        thread.call(lambda: hold.wait(10))
        thread.submit("a", PROMPTS[0], GREEDY)
        thread.abort("a")
        hold.set()
        assert (reader.wait("a").finish_reason, reader.wait("a").error) == (ERROR, "RuntimeError: planted")
        with pytest.raises(EngineDeadError, match="planted"):
            thread.submit("b", PROMPTS[0], GREEDY)
    finally:
        thread.close()


def test_a_dead_engine_waits_for_no_step(make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, reader = make_engine(QueuedRanks, draft_len=0), _Reader()
    num_delivered = count()

    def broken(request_id: str, reason: str) -> None:
        assert engine.has_requests, "ranks run a step"
        raise RuntimeError("planted")

    def deliver(outputs: list[RequestOutput]) -> None:
        next(num_delivered)
        if not any(output.finish_reason for output in outputs):
            thread.abort("a")  # the next step has been sent
        reader.deliver(outputs)

    monkeypatch.setattr(engine, "abort", broken)
    thread = EngineThread(engine, deliver)
    try:
        thread.submit("a", PROMPTS[0], GREEDY)
        assert reader.wait("a").error == "RuntimeError: planted"
        assert not thread.call(lambda: engine.has_requests).result(10)
        before = next(num_delivered)
        for _ in range(5):
            thread.call(lambda: None).result(10)
        assert next(num_delivered) == before + 1, "nothing is delivered to nobody"
    finally:
        thread.close()


def test_a_closed_engine_takes_no_requests(make_engine: Callable[..., Engine]) -> None:
    thread = EngineThread(make_engine(), lambda outputs: None)
    thread.close()
    with pytest.raises(EngineDeadError):
        thread.submit("a", PROMPTS[0], GREEDY)


class Overlapping(FailingRanks):
    """Failing ranks that have work done while they run, as ranks in other processes do; a failing step is not begun."""

    def __init__(self, ranks: Ranks, fails: Callable[[int], bool]) -> None:
        super().__init__(ranks, fails)
        self.meanwhile: Callable[[], None] = lambda: None
        self.log: list[str] = []

    def step(self, plan: StepPlan) -> StepResult:
        if not self.fails(self.calls + 1):
            self.log.append("planned")
            self.meanwhile()
        result = super().step(plan)
        self.log.append("ran")
        return result


@pytest.mark.parametrize("failed", [set(), {3, 4}])
def test_outputs_are_delivered_while_the_next_step_runs(make_engine: Callable[..., Engine], failed: set[int]) -> None:
    sampling = replace(GREEDY, max_tokens=6)
    expected = generate(make_engine(draft_len=0), [PROMPTS[0]], sampling)[0]
    ranks: list[Overlapping] = []

    def overlapping(local: Ranks) -> Overlapping:
        ranks.append(Overlapping(local, lambda call: call in failed))
        return ranks[-1]

    engine = make_engine(overlapping, draft_len=0, max_step_retries=2)
    reader = _Reader()

    def deliver(outputs: list[RequestOutput]) -> None:
        ranks[0].log.append("delivered")
        reader.deliver(outputs)

    learn = engine.learn

    def learn_aloud() -> None:
        learned_at.append(len(ranks[0].log))
        learn()

    learned_at: list[int] = []
    engine.learn = learn_aloud  # type: ignore[method-assign]
    thread = EngineThread(engine, deliver, overlap=True)
    ranks[0].meanwhile = thread.meanwhile
    try:
        thread.submit("a", PROMPTS[0], sampling)
        assert reader.wait("a").finish_reason == LENGTH
        assert thread.stats().num_requests_finished == {LENGTH: 1}
    finally:
        thread.close()
    assert reader.tokens["a"] == expected
    log = ranks[0].log
    assert log.count("delivered") == 6
    running = [place for place in learned_at if log[:place].count("planned") > log[:place].count("ran")]
    assert len(running) == 6, "once in each step, while the ranks run it"
    if not failed:
        # the first token goes at once, so the second step has nothing to deliver; the last has no step to wait for
        first, later = ["planned", "ran", "delivered", "planned", "ran"], ["planned", "delivered", "ran"]
        assert log == [*first, *later * 4, "delivered"]
    else:
        # a step that never begins takes nothing along: what waits goes out after it
        assert "delivered" in log[log.index("ran") + 1 : len(log)]
        assert log.count("planned") == log.count("ran") == 6


def test_an_idle_engine_is_tended_and_dies_if_that_says_so(make_engine: Callable[..., Engine]) -> None:
    calls: queue.Queue[int] = queue.Queue()
    numbers = count()

    def tend() -> None:
        number = next(numbers)
        calls.put(number)
        if number == 2:
            raise EngineDeadError("nothing can be mended")

    reader = _Reader()
    thread = EngineThread(make_engine(), reader.deliver, tend=tend, idle_s=0.01)
    try:
        for _ in range(3):  # nobody asks for it
            calls.get(timeout=10)
        thread.call(lambda: None).result(10)
        with pytest.raises(EngineDeadError, match="nothing can be mended"):
            thread.check_health()
        thread.look_after()
        thread.call(lambda: None).result(10)
        assert calls.empty(), "a dead engine is left alone"
    finally:
        thread.close()
