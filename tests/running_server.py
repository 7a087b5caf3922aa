"""`penstock` as a process of its own, with a Ray cluster of its own, and what its clients read."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

MODEL = "penstock-demo"
DEMO = Path(__file__).parents[1] / "demo" / "model"
PENSTOCK = str(Path(sys.executable).with_name("penstock"))
START_S = 300


@dataclass
class Server:
    """A running `penstock demo`."""

    process: subprocess.Popen[str]
    log: Path
    url: str

    @property
    def ray_environment(self) -> dict[str, str]:
        """What the server prints for other processes of the same cluster."""
        line = next(line for line in self.log.read_text().splitlines() if "RAY_ADDRESS=" in line)
        return dict(re.findall(r"(RAY_\w+)=(\S+)", line))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait(what: str, condition, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s} s: {what}"
        time.sleep(0.05)


@contextmanager
def running(command: list[str], log: Path, *, own_group: bool = False) -> Iterator[Server]:
    port = free_port()
    with log.open("w") as out:
        # An address left over from another cluster must not matter
        environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
        process = subprocess.Popen(
            [PENSTOCK, *command, "--port", str(port)],
            stdout=out,
            stderr=out,
            text=True,
            env=environment,
            process_group=0 if own_group else None,
        )
    try:
        wait("server up", lambda: process.poll() is not None or "Ctrl-C" in log.read_text(), START_S)
        assert process.poll() is None, log.read_text()
        yield Server(process, log, f"http://127.0.0.1:{port}")
    finally:
        # The last test has ended it already, unless it failed or was not selected
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def processes(server: Server, name: str) -> list[psutil.Process]:
    family = psutil.Process(server.process.pid).children(recursive=True)
    return [process for process in family if name in " ".join(process.cmdline())]


def long_stream(server: Server, killed: str | None = None, max_tokens: int = 2000) -> list[str]:
    """Return the lines of a long stream; kill the process ``killed`` while it runs."""
    body = {"model": MODEL, "prompt": "import", "max_tokens": max_tokens, "stream": True, "ignore_eos": True, "seed": 3}
    lines = []
    try:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            for line in response.iter_lines():
                lines.append(line)
                if len(lines) == 10 and killed is not None:
                    processes(server, killed)[0].kill()
    except httpx.TransportError:
        lines.append("cut off")
    return [line for line in lines if line]


def text_of(lines: list[str]) -> str:
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    return "".join(choice["text"] for event in events for choice in event["choices"])


def interrupted_stream(server: Server, kind: signal.Signals, times: int, max_tokens: int) -> list[str]:
    """Return the lines of a long stream; send the server a signal once it runs, and again when it has said so."""
    body = {"model": MODEL, "prompt": "import", "max_tokens": max_tokens, "stream": True, "ignore_eos": True, "seed": 3}
    lines = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        for line in filter(None, response.iter_lines()):
            lines.append(line)
            if len(lines) == 10:
                for _ in range(times):
                    server.process.send_signal(kind)
                    wait("it says so", lambda: "ending live requests, for at most 30 s" in server.log.read_text())
    return lines
