"""The Ray actor of one process of a gang. Ray places it and notices its death; steps reach it over the step plane."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, replace
from typing import Any

import ray.util

from ..transport.rank_loop import RankLoop, RankSettings


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a worker's process is."""

    node: str
    """Address of its machine."""
    pid: int


@dataclass(frozen=True, slots=True)
class PlacedWorker:
    """A worker as its gang knows it."""

    bundle: int
    """Its place in the gang's placement group."""
    actor: Any
    where: Whereabouts


class Worker:
    """Is a rank, or a spare, for one coordinator after another; what it has loaded it keeps.

    Needs a few threads: ``run`` holds one for as long as it serves a coordinator, control calls use the others.
    """

    def __init__(self) -> None:
        self._loop = RankLoop()
        self._counting, self._serving = threading.Lock(), threading.Lock()
        self._num_runs = 0

    def where(self) -> Whereabouts:
        """Return where this is."""
        return Whereabouts(ray.util.get_node_ip_address(), os.getpid())

    def run(self, settings: RankSettings) -> None:
        """Serve a coordinator until it says to close or another one takes this worker over."""
        with self._counting:
            self._num_runs += 1
            number = self._num_runs
        with self._serving:
            if number == self._num_runs:
                node = settings.node or self.where().node
                self._loop.serve(replace(settings, node=node), lambda: self._num_runs > number)
