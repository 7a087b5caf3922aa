"""The Ray actor of one rank. Ray places it and notices its death; steps reach it over the step plane."""

from __future__ import annotations

import threading

import ray.util

from ..transport.rank_loop import RankSettings, run_rank


class Worker:
    """Runs one rank. Needs two threads: ``run`` holds one for the rank's life, control calls use the other."""

    def __init__(self) -> None:
        self._stopped = threading.Event()

    def node(self) -> str:
        """Return the address of this machine."""
        return ray.util.get_node_ip_address()

    def run(self, settings: RankSettings) -> None:
        """Load and serve until the coordinator says to close or ``stop`` is called."""
        run_rank(settings, self._stopped.is_set)

    def stop(self) -> None:
        """Make ``run`` return once it waits for a command."""
        self._stopped.set()
