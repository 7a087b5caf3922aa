from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from penstock.cluster.engine.backend import EngineDeadError
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.engine_thread import EngineThread
from penstock.cluster.engine.output import ERROR, LENGTH, RequestOutput

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


def test_a_closed_engine_takes_no_requests(make_engine: Callable[..., Engine]) -> None:
    thread = EngineThread(make_engine(), lambda outputs: None)
    thread.close()
    with pytest.raises(EngineDeadError):
        thread.submit("a", PROMPTS[0], GREEDY)
