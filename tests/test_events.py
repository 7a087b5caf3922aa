"""One structured event per fault and recovery: kept, counted, and in the log."""

from __future__ import annotations

import logging

import pytest

from penstock.cluster.engine.events import DIED, FAULT, RECOVERY, SILENT, Event, EventLog


def test_events_are_kept_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    fault = Event(FAULT, DIED, "the process of rank 1 ended", time_s=5.0, ranks=(1,))
    recovery = Event(
        RECOVERY, DIED, "rank 1 is there again", duration_s=0.3, expert_bytes_loaded=64, num_requests_replayed=3
    )
    log = EventLog([fault])
    with caplog.at_level(logging.INFO):
        log.record(recovery)
        log.record(Event(FAULT, SILENT, "rank 0 did not answer"))
    assert [event.what for event in log.events()] == [DIED, DIED, SILENT]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    said = caplog.records[0].getMessage()
    assert said.startswith("rank 1 is there again; kind='recovery' what='died' ")
    assert "expert_bytes_loaded=64 num_requests_replayed=3" in said
    totals = log.totals()
    assert (totals.faults, totals.recoveries) == ({DIED: 1, SILENT: 1}, {DIED: 1})
    assert (totals.expert_bytes_loaded, totals.num_requests_replayed) == (64, 3)
    assert totals.recovery_s.total == pytest.approx(0.3)
    assert sum(totals.recovery_s.counts) == 1


def test_only_the_last_events_are_kept_and_all_are_counted() -> None:
    log = EventLog()
    for number in range(3000):
        log.record(Event(FAULT, DIED, str(number)))
    assert [event.message for event in log.events()] == [str(number) for number in range(1976, 3000)]
    assert log.totals().faults == {DIED: 3000}
