"""The Ray actor of one rank. Ray places it and notices its death; steps reach it over the step plane."""

from __future__ import annotations

import ray.util

from ..transport.rank_loop import RankSettings, run_rank


class Worker:
    """Runs one rank. Needs two threads: ``run`` holds one for the rank's life, control calls use the other."""

    def node(self) -> str:
        """Return the address of this machine."""
        return ray.util.get_node_ip_address()

    def run(self, settings: RankSettings) -> None:
        """Load and serve until the coordinator says to close."""
        run_rank(settings)
