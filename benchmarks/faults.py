"""Faults that are done to the processes of a server and to the machines that it runs on."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .cluster_server import ClusterServer
from .server_process import ServerProcess

_OBSERVE_S, _WAITS_S = 0.3, 1.0
_LOOKS = 5
"""A look at a process tree finds nothing when a process ends in the middle of it."""
_IDLE_SHARE = 0.05
"""A spare that waits for its rank uses less of a core; one that starts far more."""
_WORST = ("gang", "coordinator", "rank")
"""What may be on a machine, the gravest loss first."""


@dataclass(frozen=True, slots=True)
class Committed:
    """A fault that has been done."""

    undo: Callable[[], None] = lambda: None
    """Has the machine come back."""
    hit: str = ""
    """The gravest of what was on the machine: a process of which role."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault. ``do`` is told how many ranks there are."""

    name: str
    do: Callable[[ServerProcess, int], Committed]
    cuts_streams: bool = False
    """Streams end with an error, and their clients ask again."""
    is_silent: bool = False
    """Nothing but a deadline tells of it."""
    needs_machines: bool = False
    needs_spare: bool = False
    weight: int = 1
    """How often it comes, relative to the others."""


def workers(server: ServerProcess) -> list[psutil.Process]:
    """Return the processes that are ranks or spares; there are some unless the gang is being built anew.

    One that is stopped is none any more, though it may take Ray some seconds to end it.
    """
    for _ in range(_LOOKS):
        if found := [process for role, process in server.family() if role == "rank" and not _is_stopped(process)]:
            return found
        time.sleep(_OBSERVE_S)
    return []


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return True


def by_work(server: ServerProcess, observe_s: float = _OBSERVE_S) -> list[tuple[float, psutil.Process]]:
    """Return (share of a core, process) of ranks and spares, the busiest first; ranks are, while requests run."""
    before = {process: _cpu_s(process) for process in workers(server)}
    time.sleep(observe_s)
    shares = [((_cpu_s(process) - spent) / observe_s, process) for process, spent in before.items()]
    return sorted(shares, key=lambda entry: -entry[0])


def spares_are_ready(server: ServerProcess, num_ranks: int, num_spares: int) -> bool:
    """Tell whether all ranks and spares are there, and the spares wait."""
    found = by_work(server, _WAITS_S)
    return len(found) == num_ranks + num_spares and all(share < _IDLE_SHARE for share, _ in found[num_ranks:])


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def _signal_rank(kind: signal.Signals) -> Callable[[ServerProcess, int], Committed]:
    def send(server: ServerProcess, _: int) -> Committed:
        by_work(server)[0][1].send_signal(kind)
        return Committed()

    return send


def _kill_spare(server: ServerProcess, _: int) -> Committed:
    by_work(server)[-1][1].kill()
    return Committed()


def _kill_rank_and_spare(server: ServerProcess, _: int) -> Committed:
    found = by_work(server)
    found[-1][1].kill()
    found[0][1].kill()
    return Committed()


def _kill_role(role: str) -> Callable[[ServerProcess, int], Committed]:
    def kill(server: ServerProcess, _: int) -> Committed:
        for found, process in server.family():
            if found == role:
                process.kill()
        return Committed()

    return kill


def _on_machine(
    do: Callable[[ClusterServer, int], None],
    undo: Callable[[ClusterServer, int], None],
    *,
    rather: Callable[[list[str]], Any] = lambda held: ("rank" not in held, "gang" in held, "coordinator" in held),
) -> Callable[[ServerProcess, int], Committed]:
    """Return what does a fault to a machine, but for the head, and has that come back.

    ``rather``: of the roles that a machine holds, the key by which the first is taken; a rank alone, unless told
    otherwise, for whatever else is lost is a fault of its own.
    """

    def commit(server: ServerProcess, num_ranks: int) -> Committed:
        assert isinstance(server, ClusterServer)
        ranks = [process for _, process in by_work(server)[:num_ranks]]
        of_machine = {i: server.on_machine(i) for i in range(1, server.num_machines)}
        held = {
            i: [
                ("rank" if process in ranks else role) for role, process in family if role != "rank" or process in ranks
            ]
            for i, family in of_machine.items()
        }
        machine = min(held, key=lambda i: rather(held[i]))
        hit = next((role for role in _WORST if role in held[machine]), "nothing")
        do(server, machine)
        return Committed(lambda: undo(server, machine), hit)

    return commit


FAULTS = (
    Fault("SIGKILL of a rank", _signal_rank(signal.SIGKILL), weight=3),
    Fault("SIGSTOP of a rank", _signal_rank(signal.SIGSTOP), is_silent=True, weight=2),
    Fault("SIGKILL of a rank and the spare", _kill_rank_and_spare, needs_spare=True, weight=2),
    Fault("SIGKILL of the spare", _kill_spare, needs_spare=True),
    Fault("SIGKILL of the coordinator", _kill_role("coordinator"), weight=2),
    Fault("SIGKILL of the gang's replica", _kill_role("gang")),
    Fault("SIGKILL of the ingress", _kill_role("ingress"), cuts_streams=True),
    Fault(
        "SIGKILL of a raylet",
        _on_machine(ClusterServer.kill_raylet, ClusterServer.rejoin),
        needs_machines=True,
    ),
    Fault(
        "death of a node",
        _on_machine(lambda server, i: server.machines.kill_all(i), ClusterServer.rejoin),
        needs_machines=True,
    ),
    Fault(
        "death of a node with more than ranks",
        _on_machine(
            lambda server, i: server.machines.kill_all(i),
            ClusterServer.rejoin,
            rather=lambda held: ("gang" not in held, "coordinator" not in held, "rank" not in held),
        ),
        needs_machines=True,
    ),
    Fault(
        "link down",
        _on_machine(lambda server, i: server.machines.unplug(i), ClusterServer.plug_in_and_rejoin),
        is_silent=True,
        needs_machines=True,
    ),
    Fault(
        "silent link",
        _on_machine(lambda server, i: server.machines.silence(i), ClusterServer.hear_and_rejoin),
        is_silent=True,
        needs_machines=True,
    ),
)


def schedule(number: int, kinds: Sequence[Fault]) -> list[Fault]:
    """Return ``number`` faults of these kinds by their weights, each kind once at least, in no order."""
    weighted = [fault for fault in kinds for _ in range(fault.weight)]
    rest = [weighted[i % len(weighted)] for i in range(max(0, number - len(kinds)))]
    return [*kinds[:number], *rest]


def leftovers(family: Sequence[psutil.Process], timeout_s: float) -> list[str]:
    """Return the names of ``family``'s processes that are still there after ``timeout_s``."""
    _, alive = psutil.wait_procs(family, timeout=timeout_s)
    names = []
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                names.append(Path(process.name()).name)
    return names
