"""Faults that are done to the processes of a server."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from .server_process import ServerProcess

_OBSERVE_S = 0.3
_LOOKS = 5
"""A look at a process tree finds nothing when a process ends in the middle of it."""
_IDLE_SHARE = 0.05
"""A spare that waits for its rank uses less of a core; one that starts far more."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault."""

    name: str
    do: Callable[[ServerProcess], None]
    cuts_streams: bool = False
    """Streams end with an error, and their clients ask again."""
    silent: bool = False
    """Nothing but a deadline tells of it."""


def workers(server: ServerProcess) -> list[psutil.Process]:
    """Return the processes that are ranks or spares; there are some unless the gang is being built anew."""
    for _ in range(_LOOKS):
        if found := [process for role, process in server.family() if role == "rank"]:
            return found
        time.sleep(_OBSERVE_S)
    return []


def by_work(server: ServerProcess) -> list[tuple[float, psutil.Process]]:
    """Return (share of a core, process) of ranks and spares, the busiest first; ranks are, while requests run."""
    before = {process: _cpu_s(process) for process in workers(server)}
    time.sleep(_OBSERVE_S)
    shares = [((_cpu_s(process) - spent) / _OBSERVE_S, process) for process, spent in before.items()]
    return sorted(shares, key=lambda entry: -entry[0])


def spares_are_ready(server: ServerProcess, num_ranks: int, num_spares: int) -> bool:
    """Tell whether all ranks and spares are there, and the spares wait."""
    found = by_work(server)
    return len(found) == num_ranks + num_spares and all(share < _IDLE_SHARE for share, _ in found[num_ranks:])


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def _signal_rank(kind: signal.Signals) -> Callable[[ServerProcess], None]:
    return lambda server: by_work(server)[0][1].send_signal(kind)


def _kill_spare(server: ServerProcess) -> None:
    by_work(server)[-1][1].kill()


def _kill_rank_and_spare(server: ServerProcess) -> None:
    found = by_work(server)
    found[-1][1].kill()
    found[0][1].kill()


def _kill_role(role: str) -> Callable[[ServerProcess], None]:
    def kill(server: ServerProcess) -> None:
        for found, process in server.family():
            if found == role:
                process.kill()

    return kill


FAULTS = (
    Fault("SIGKILL of a rank", _signal_rank(signal.SIGKILL)),
    Fault("SIGSTOP of a rank", _signal_rank(signal.SIGSTOP), silent=True),
    Fault("SIGKILL of a rank and the spare", _kill_rank_and_spare),
    Fault("SIGKILL of the spare", _kill_spare),
    Fault("SIGKILL of the coordinator", _kill_role("coordinator")),
    Fault("SIGKILL of the gang's replica", _kill_role("gang")),
    Fault("SIGKILL of the ingress", _kill_role("ingress"), cuts_streams=True),
)


def leftovers(family: list[psutil.Process], timeout_s: float) -> list[str]:
    """Return the names of ``family``'s processes that are still there after ``timeout_s``."""
    _, alive = psutil.wait_procs(family, timeout=timeout_s)
    names = []
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                names.append(Path(process.name()).name)
    return names
