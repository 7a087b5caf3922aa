"""Machines on one machine: network namespaces, each with an eth0 of its own on a common bridge.

Nothing of the machine's own network is touched: the bridge is in a namespace too. Needs root and iproute2's `ip` and
`bridge`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psutil

PREFIX = "10.77.0"
_COUNTER = count()
_CLONE_NEWNET = 0x40000000
_DISABLED, _FORWARDING = "0", "3"
"""States of a bridge's port."""


def objection() -> str | None:
    """Return why there can be no namespaces here; None if there can."""
    if shutil.which("ip") is None or shutil.which("bridge") is None:
        return "no `ip` or no `bridge` command (Debian's iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"penstock-{os.getpid()}-probe"
    tried = _ip("netns", "add", name, check=False)
    if tried.returncode:
        return f"`ip netns add` fails: {tried.stderr.strip()}"
    try:
        tried = _ip("-n", name, "link", "add", "br0", "type", "bridge", check=False)
        return f"no bridge in a namespace: {tried.stderr.strip()}" if tried.returncode else None
    finally:
        _ip("netns", "del", name)


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return _run("ip", *arguments, check=check)


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=check, capture_output=True, text=True, timeout=30)


class Machines:
    """Machines 0, 1, ... with addresses 10.77.0.1, 10.77.0.2, ...; use `machines`, which ends them."""

    def __init__(self, number: int) -> None:
        stem = f"penstock-{os.getpid()}-{next(_COUNTER)}"
        self.switch = f"{stem}-switch"
        self.names = [f"{stem}-{i}" for i in range(number)]

    def start(self) -> None:
        """Make all of them."""
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "br0", "up")
        for i, name in enumerate(self.names):
            _ip("netns", "add", name)
            _ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"port{i}", "netns", self.switch)
            _ip("-n", self.switch, "link", "set", f"port{i}", "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"{self.address(i)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def address(self, i: int) -> str:
        """Return the address of machine ``i``."""
        return f"{PREFIX}.{i + 1}"

    def command(self, i: int, *words: str) -> list[str]:
        """Return the command that runs ``words`` on machine ``i``."""
        return ["ip", "netns", "exec", self.names[i], *words]

    def popen(self, i: int, *words: str, **options: Any) -> subprocess.Popen[str]:
        """Start a program on machine ``i``."""
        return subprocess.Popen(self.command(i, *words), text=True, **options)

    def run(self, i: int, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a program on machine ``i`` to its end."""
        return subprocess.run(self.command(i, *words), capture_output=True, text=True, check=False, **options)

    def pids(self, i: int) -> list[int]:
        """Return the processes on machine ``i``."""
        return [int(pid) for pid in _ip("netns", "pids", self.names[i], check=False).stdout.split()]

    def processes(self, i: int) -> list[psutil.Process]:
        """Return the processes on machine ``i``."""
        found = []
        for pid in self.pids(i):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
        return found

    def kill_all(self, i: int) -> None:
        """End every process on machine ``i``."""
        deadline = time.monotonic() + 30
        while (pids := self.pids(i)) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def silence(self, i: int) -> None:
        """Drop all that machine ``i`` sends or is sent: its link looks well, and nobody is told."""
        self._set_port(i, _DISABLED)

    def hear(self, i: int) -> None:
        """Undo `silence`."""
        self._set_port(i, _FORWARDING)

    def _set_port(self, i: int, state: str) -> None:
        _run("bridge", "-n", self.switch, "link", "set", "dev", f"port{i}", "state", state)

    def unplug(self, i: int) -> None:
        """Take machine ``i``'s interface down, of which machine ``i`` knows."""
        _ip("-n", self.names[i], "link", "set", "eth0", "down")

    def plug_in(self, i: int) -> None:
        """Undo `unplug`."""
        _ip("-n", self.names[i], "link", "set", "eth0", "up")

    @contextlib.contextmanager
    def inside(self, i: int) -> Iterator[None]:
        """Have this thread, and those that it starts, use the network of machine ``i`` until the end of the block."""
        libc = ctypes.CDLL(None, use_errno=True)

        def enter(path: Path) -> None:
            with path.open() as network:
                if libc.setns(network.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"cannot enter the network {path}")

        with Path("/proc/thread-self/ns/net").open() as own:
            enter(Path("/run/netns") / self.names[i])
            try:
                yield
            finally:
                libc.setns(own.fileno(), _CLONE_NEWNET)

    def end(self) -> None:
        """End every process on them, and them."""
        for i, name in enumerate(self.names):
            self.kill_all(i)
            _ip("netns", "del", name, check=False)
        _ip("netns", "del", self.switch, check=False)


@contextlib.contextmanager
def machines(number: int) -> Iterator[Machines]:
    """Have so many machines, until the end of the block."""
    made = Machines(number)
    try:
        made.start()
        yield made
    finally:
        made.end()
