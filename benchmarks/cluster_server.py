"""A server on several machines, whose machines may be lost and come back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from .machines import Machines
from .ray_cluster import RayCluster
from .server_process import OTHER, ServerProcess, role_of

_NOTICED_DEAD_S = 4.0
"""Ray takes a silent node for dead after 5 to 6 s (`ray_cluster.SETTINGS`), and its raylet ends when it hears of that:
so much later than streams go on, which is after `chaos.STEP_TIMEOUT_S` at the earliest."""
_GONE_S = 60.0
_LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class ClusterServer(ServerProcess):
    """``penstock serve`` on ``cluster``."""

    cluster: RayCluster

    @property
    def machines(self) -> Machines:
        """Where it runs."""
        return self.cluster.machines

    @property
    def num_machines(self) -> int:
        """How many there are, the head included."""
        return len(self.machines.names)

    def family(self) -> list[tuple[str, psutil.Process]]:
        """Return (role, process) for every process on all machines."""
        return [found for i in range(self.num_machines) for found in self.on_machine(i)]

    def on_machine(self, i: int) -> list[tuple[str, psutil.Process]]:
        """Return (role, process) for every process on machine ``i``."""
        return [(role_of(process), process) for process in self.machines.processes(i)]

    def kill_raylet(self, i: int) -> None:
        """Kill what represents machine ``i`` in Ray; its children end by themselves."""
        for process in self._raylets(i):
            process.kill()

    def rejoin(self, i: int) -> None:
        """Start Ray on machine ``i`` again, once our processes there have ended; raises ``RuntimeError`` otherwise."""
        deadline = time.monotonic() + _GONE_S
        while left := [role for role, _ in self.on_machine(i) if role != OTHER]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"on machine {i}, which was lost, are still {left}")
            time.sleep(_LOOK_S)
        self.machines.kill_all(i)  # what Ray starts beside the raylet, such as its log monitor
        self.cluster.join(i)

    def plug_in_and_rejoin(self, i: int) -> None:
        """Undo ``unplug`` when Ray has noticed it."""
        time.sleep(_NOTICED_DEAD_S)
        self.machines.plug_in(i)
        self._rejoin_noticed(i)

    def hear_and_rejoin(self, i: int) -> None:
        """Undo ``silence`` when Ray has noticed it."""
        time.sleep(_NOTICED_DEAD_S)
        self.machines.hear(i)
        self._rejoin_noticed(i)

    def _rejoin_noticed(self, i: int) -> None:
        _, alive = psutil.wait_procs(self._raylets(i), timeout=_GONE_S)
        if not alive:  # else the link was back before Ray took the node for dead
            self.rejoin(i)

    def _raylets(self, i: int) -> list[psutil.Process]:
        return [process for process in self.machines.processes(i) if _program(process) == "raylet"]


def _program(process: psutil.Process) -> str:
    try:
        return Path(process.exe()).name
    except (psutil.Error, OSError):
        return ""
