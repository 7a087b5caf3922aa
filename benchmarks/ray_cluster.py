"""A Ray cluster with a node on each of several machines, and `penstock serve` on it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .machines import Machines

RAY_PORT = 6390
PORT = 8000
START_S = 240
STOP_S = 60
PENSTOCK, RAY = (str(Path(sys.executable).with_name(name)) for name in ("penstock", "ray"))
# What docs/deployment.md recommends: a silent node counts as dead after 5 s, a stopped process is ended after 1 s
SETTINGS = {
    "RAY_worker_niceness": "0",
    "RAY_kill_worker_timeout_milliseconds": "1000",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
_GROUPS = """
import json, ray
from ray.util import placement_group_table
ray.init("auto", log_to_driver=False, logging_level="ERROR")
print(json.dumps([group["state"] for group in placement_group_table().values()]))
"""


class RayCluster:
    """Ray with a token on ``machines``: the head on the first, one more node with each `join`.

    ``folder``: where Ray and this keep their files; Ray's socket paths must be short. ``num_head_cpus``: by Ray's
    count; every other node has 2.
    """

    def __init__(self, machines: Machines, folder: Path, *, num_head_cpus: int = 2) -> None:
        self.machines, self.folder, self._num_head_cpus = machines, folder, num_head_cpus
        self.address = f"{machines.address(0)}:{RAY_PORT}"
        self.url = f"http://{machines.address(0)}:{PORT}"
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "OMP_NUM_THREADS") if name in os.environ}
        # Another user's home, so to say: no token, model or configuration of this one's
        self.stranger = {**kept, "HOME": str(folder), "RAY_TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}
        self.environment = {
            **self.stranger,
            **SETTINGS,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        self.start_head()

    def start_head(self) -> None:
        """Start the head, which must not run."""
        # What one that was killed leaves behind
        (self.folder / "ray_current_cluster").unlink(missing_ok=True)
        head = ["--head", f"--port={RAY_PORT}", f"--temp-dir={self.folder}", "--include-dashboard=false"]
        self._start(0, self._num_head_cpus, *head)

    def join(self, i: int) -> None:
        """Start Ray on machine ``i``."""
        self._start(i, 2, f"--address={self.address}")

    def _start(self, i: int, num_cpus: int, *options: str) -> None:
        shared = [f"--num-cpus={num_cpus}", "--object-store-memory=80000000", "--disable-usage-stats"]
        address = f"--node-ip-address={self.machines.address(i)}"
        done = self.machines.run(i, RAY, "start", *options, address, *shared, env=self.environment, timeout=START_S)
        if done.returncode:
            raise RuntimeError(f"Ray does not start on machine {i}:\n{done.stdout}{done.stderr}")

    @contextmanager
    def serving(self, model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
        """Run ``penstock serve`` for ``model`` from the head, until the end of the block; yield when it serves.

        Yields its process and the file that it writes to. Raises ``RuntimeError`` with that if it does not come up, or
        does not end well.
        """
        log = self.folder / "log"
        where = ["--address", self.address, "--host", self.machines.address(0), "--port", str(PORT)]
        command = [PENSTOCK, "serve", str(model), *where, *options]
        with log.open("w") as out:
            server = self.machines.popen(0, *command, env=self.environment, stdout=out, stderr=out)
        try:
            deadline = time.monotonic() + START_S
            while "Ctrl-C" not in log.read_text():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not come up:\n{log.read_text()}")
                time.sleep(0.05)
            yield server, log
            if server.poll() is None:
                server.send_signal(signal.SIGINT)
                if server.wait(STOP_S):
                    raise RuntimeError(f"the server did not end well:\n{log.read_text()}")
        finally:
            server.kill()
            server.wait()

    def program(self, i: int, program: str, *arguments: str, environment: dict[str, str] | None = None) -> Any:
        """Return what a Python ``program`` that runs on machine ``i`` prints as JSON."""
        command = [sys.executable, "-c", program, *arguments]
        done = self.machines.run(i, *command, env=environment or self.environment, timeout=180)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(done.stdout)

    def num_placement_groups(self) -> int:
        """Return how many there are."""
        states: Sequence[str] = self.program(0, _GROUPS, environment={**self.environment, "RAY_ADDRESS": self.address})
        return sum(state != "REMOVED" for state in states)
