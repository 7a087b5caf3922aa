"""Ranks as child processes of this one, on this machine, without Ray. They end when this process does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from ..config import EngineConfig
from ..placement_file import placement_of
from .curve import LOOPBACK
from .rank_loop import RankSettings, run_rank
from .remote_ranks import RemoteRanks

_ENVIRONMENT = {"GOMP_SPINCOUNT": "20000"}
"""OpenMP's threads otherwise spin for milliseconds at each barrier, against each other where ranks share cores. What
the user's own environment says goes first."""


class _ChildProcess:
    """One of them, as a `RankProcess`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def ended(self) -> str | None:
        """Return its exit code in words; None while it lives."""
        return None if self._process.poll() is None else f"ended with exit code {self._process.returncode}"

    def kill(self) -> None:
        """End it."""
        self._process.kill()


class ProcessRanks(RemoteRanks):
    """Starts ``expert_parallel_size`` processes and ``num_spares`` on loopback, and waits until the ranks have loaded.

    ``command``: the program of a rank; it is given its settings on standard input. Raises ``ValueError`` naming
    ``placement`` for a file that does not fit.
    """

    def __init__(self, config: EngineConfig, command: Sequence[str] = ()) -> None:
        placement = placement_of(config)
        self._command = command or [sys.executable, "-m", "penstock.cluster.transport.process_ranks"]
        self.processes: list[subprocess.Popen[bytes]] = []
        """All that were ever started, in that order: first the ranks."""
        super().__init__(config, LOOPBACK, self._launch, placement, node=LOOPBACK)
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def _launch(self, settings: RankSettings) -> _ChildProcess:
        # In a group of its own: Ctrl-C on a terminal is for whoever drives the ranks, who may go on after it
        process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, env={**_ENVIRONMENT, **os.environ}, process_group=0
        )
        self.processes.append(process)
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already, which is noticed as such
            process.stdin.write(msgspec.json.encode(settings) + b"\n")
            process.stdin.flush()
        return _ChildProcess(process)

    def close(self) -> None:
        """Stop the processes and wait for them."""
        super().close()
        for process in self.processes:
            if process.stdin is not None:
                with suppress(BrokenPipeError):
                    process.stdin.close()
        for process in self.processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def read_settings() -> RankSettings:
    """Read this rank's settings from standard input, which then stays open as long as the parent lives."""
    return msgspec.json.decode(sys.stdin.buffer.readline(), type=RankSettings)


def parent_is_gone() -> bool:
    """Tell whether standard input has been closed."""
    import select

    readable, _, _ = select.select([sys.stdin], [], [], 0)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1)


if __name__ == "__main__":
    run_rank(read_settings(), parent_is_gone)
