"""A rank gets out of collectives that others will never finish."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from penstock.workers import collective_guard
from penstock.workers.collective_guard import CollectiveGuard
from penstock.workers.collectives import Collectives
from penstock.workers.process_group import open_store

SOON_S = 10.0


class Device:
    """A collective that ends when its communicator is aborted, and not before."""

    def __init__(self) -> None:
        self.is_aborted, self.has_no_graphs = threading.Event(), threading.Event()
        self.has_no_graphs.set()
        self.num_aborted = 0

    def abort(self) -> None:
        self.num_aborted += 1
        self.is_aborted.set()
        assert self.has_no_graphs.wait(SOON_S)


def guard_of(device: Device, timeout_s: float) -> tuple[dist.TCPStore, CollectiveGuard]:
    store, address = open_store("127.0.0.1")
    connection = dist.TCPStore(address.host, address.port, is_master=False, timeout=timedelta(seconds=SOON_S))
    return store, CollectiveGuard(connection, timeout_s, device.abort)


def test_a_step_that_takes_too_long_is_aborted() -> None:
    device = Device()
    store, guard = guard_of(device, 0.2)
    guard.check()
    guard.arm()
    assert device.is_aborted.wait(SOON_S)
    with pytest.raises(RuntimeError, match=r"aborted: a step took more than 0\.2 s"):
        guard.check()
    guard.close()
    assert device.num_aborted == 1
    del store


def test_a_store_that_goes_ends_collectives_at_once() -> None:
    device = Device()
    store, guard = guard_of(device, 3600)
    guard.arm()
    assert not device.is_aborted.is_set()
    del store
    assert device.is_aborted.wait(SOON_S)
    with pytest.raises(RuntimeError, match="gave the group up"):
        guard.check()
    guard.close()


def test_nothing_is_aborted_between_steps() -> None:
    device = Device()
    store, guard = guard_of(device, 0.1)
    guard.arm()
    guard.disarm()
    assert not device.is_aborted.wait(0.5), "no step is under way"
    guard.close()
    assert device.num_aborted == 1, "leaving a group is no farewell that others must answer"
    guard.arm()
    del store
    guard.close()
    assert device.num_aborted == 1


def test_arming_again_starts_the_time_anew() -> None:
    device = Device()
    store, guard = guard_of(device, 1.0)
    for _ in range(8):
        guard.arm()
        assert not device.is_aborted.wait(0.2)
    guard.close()
    del store


def test_closing_waits_for_what_is_being_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's abort returns once the graphs with its collectives are gone, which is this thread's doing."""
    device = Device()
    device.has_no_graphs.clear()
    store, guard = guard_of(device, 3600)
    del store
    assert device.is_aborted.wait(SOON_S)
    monkeypatch.setattr(collective_guard, "_END_S", 0.2)
    with pytest.raises(RuntimeError, match="could not be aborted"):
        guard.close()
    device.has_no_graphs.set()
    monkeypatch.undo()
    guard.close()


def test_no_collective_begins_in_a_group_that_is_being_aborted() -> None:
    """NCCL's would wait for the abort, and that for the graphs of whoever begins it."""
    device = Device()
    store, guard = guard_of(device, 3600)
    collectives = Collectives(guard=guard)
    del store
    assert device.is_aborted.wait(SOON_S)
    for begin in (
        lambda: collectives.all_reduce(torch.ones(2)),
        lambda: collectives.all_to_all(torch.ones(2), torch.ones(2)),
        lambda: collectives.begin_all_to_all(torch.ones(2), [2], [2]),
    ):
        with pytest.raises(RuntimeError, match="collectives were aborted"):
            begin()
    guard.close()
