"""A server as a user starts it, for benchmarks that ask it over HTTP: started, watched, ended."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

START_S = 300.0
STOP_S = 60.0
_ROLES = {
    "ray::Worker": "rank",
    "ray::Coordinator": "coordinator",
    "ray::ServeReplica:default:Ingress": "ingress",
    "ray::ServeReplica:default:Gang": "gang",
    "ray::ProxyActor": "proxy",
    "ray::ServeController": "controller",
}
OTHER = "ray"
"""The role of Ray's own processes and of the command itself."""


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A running ``penstock serve`` or ``penstock demo``."""

    url: str
    pid: int

    def family(self) -> list[tuple[str, psutil.Process]]:
        """Return (role, process) for every process of the server."""
        try:
            command = psutil.Process(self.pid)
            return [(role_of(process), process) for process in (command, *command.children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds used so far, by role."""
        used: dict[str, float] = {}
        for role, process in self.family():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            used[role] = used.get(role, 0.0) + times.user + times.system
        return used


def name_of(process: psutil.Process) -> str:
    """Return the role of a process of the server, or the program's name for Ray's own."""
    role = role_of(process)
    if role != OTHER:
        return role
    try:
        words = [word for word in process.cmdline() if not word.startswith("-")]
    except psutil.Error:
        return OTHER
    program = words[1:] if words and Path(words[0]).name.startswith("python") else words
    return Path(program[0]).name if program else OTHER


def role_of(process: psutil.Process) -> str:
    """Return what part a process of the server plays."""
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:  # it ends as we look
        return OTHER
    return next((role for start, role in _ROLES.items() if title.startswith(start)), OTHER)


@contextmanager
def serving(command: Sequence[str]) -> Iterator[ServerProcess]:
    """Run ``penstock`` with ``command`` (serve or demo) on a free port of loopback; yield when it answers, then end it.

    Raises ``RuntimeError`` with what it wrote if it does not come up.
    """
    port = _free_port()
    program = [str(Path(sys.executable).with_name("penstock")), *command, "--port", str(port)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(program, stdout=log, stderr=subprocess.STDOUT)
        try:
            server = ServerProcess(f"http://127.0.0.1:{port}", process.pid)
            deadline = time.monotonic() + START_S
            while not _answers(f"{server.url}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"the server did not come up:\n{log.read()}")
                time.sleep(0.5)
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(STOP_S)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
