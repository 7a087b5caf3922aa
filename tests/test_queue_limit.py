from __future__ import annotations

import pickle

import pytest

from penstock.cluster.engine.backend import QueueFullError
from penstock.cluster.engine.queue_limit import QueueLimit


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def fill(limit: QueueLimit) -> int:
    """Take until refused; return how many were let in."""
    taken = 0
    while True:
        try:
            limit.take()
        except QueueFullError:
            return taken
        taken += 1


def refusal(limit: QueueLimit) -> QueueFullError:
    with pytest.raises(QueueFullError) as caught:
        limit.take()
    return caught.value


def test_an_idle_engine_takes_what_can_run_and_what_may_wait() -> None:
    limit = QueueLimit(5, 3, clock=Clock())
    assert fill(limit) == 8
    assert limit.num_refused == 1
    assert fill(limit) == 0
    assert limit.num_refused == 2


def test_requests_on_their_way_to_the_scheduler_count() -> None:
    limit = QueueLimit(5, 3, clock=Clock())
    for _ in range(4):
        limit.take()
    # Three of the four have arrived and run; one is on its way
    for _ in range(3):
        limit.seen()
    limit.update(0, 0, 3)
    assert fill(limit) == 4
    for _ in range(5):
        limit.seen()
    limit.update(5, 0, 0)
    assert fill(limit) == 0
    limit.update(3, 0, 2)
    assert fill(limit) == 2


def test_preempted_requests_in_the_queue_leave_no_room_for_new_ones() -> None:
    limit = QueueLimit(2, 3, clock=Clock())
    limit.update(4, 0, -2)
    assert fill(limit) == 0
    limit.update(1, 0, 3)
    assert fill(limit) == 1


def test_the_advice_follows_the_pace_at_which_the_queue_drains() -> None:
    clock = Clock()
    limit = QueueLimit(10, 1, clock=clock)
    fill(limit)
    assert refusal(limit).retry_after_s == 1.0, "nothing is known yet"
    for _ in range(11):
        limit.seen()
    limit.update(10, 0, 1)
    clock.now += 4
    limit.update(10, 0, 1)
    assert refusal(limit).retry_after_s == pytest.approx(20.0), "2 in 4 s, 10 wait"
    clock.now += 4
    limit.update(10, 0, 14)
    assert refusal(limit).retry_after_s == pytest.approx(5.0)
    # A queue that stands still
    clock.now += 300
    assert refusal(limit).retry_after_s == 60.0
    # Old times are forgotten
    limit.update(10, 0, 0)
    clock.now += 1
    limit.update(10, 0, 302)
    assert refusal(limit).retry_after_s == pytest.approx(1.0, abs=0.1)
    limit.update(0, 1, 10)
    fill(limit)
    assert refusal(limit).retry_after_s == 1.0, "nobody had to wait"


def test_the_refusal_survives_a_pickle_and_names_the_setting() -> None:
    limit = QueueLimit(1, 0, clock=Clock())
    limit.take()
    error = refusal(limit)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is QueueFullError
    assert str(copy) == str(error)
    assert str(error).startswith("1 requests are waiting already (max_queued_requests)")
    assert copy.retry_after_s == error.retry_after_s
