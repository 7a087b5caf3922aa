"""The workers that a coordinator has been given, as processes that `RemoteRanks` starts."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

import ray
from ray.exceptions import RayError

from ..transport.rank_loop import RankSettings
from .worker import PlacedWorker


class WorkerProcess:
    """A `RankProcess`: a worker that runs as told, or will as soon as there is one."""

    def __init__(self, pool: WorkerPool, settings: RankSettings) -> None:
        self._pool, self.settings = pool, settings
        self.worker: PlacedWorker | None = None
        self.how: str | None = None

    def ended(self) -> str | None:
        """Return what Ray says of its end."""
        return self.how

    def kill(self) -> None:
        """End it, and have the gang put another worker in its place."""
        self._pool.discard(self)


class WorkerPool:
    """Hands workers to processes that want one, in the order in which they came.

    Belongs to the event loop that it was made on; `launch` and `WorkerProcess` may be used by any thread.
    ``node``: this machine's address. ``on_vacancy`` is called on the event loop with the bundle of a worker that is
    lost, ``on_end`` when a process has ended that nobody killed.
    """

    def __init__(
        self,
        workers: Iterable[PlacedWorker],
        node: str,
        on_vacancy: Callable[[int], None],
        on_end: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._node, self._on_vacancy, self._on_end = node, on_vacancy, on_end
        self._free = deque(workers)
        self._wanting: deque[WorkerProcess] = deque()
        self._watches: set[asyncio.Task[None]] = set()

    def launch(self, settings: RankSettings) -> WorkerProcess:
        """Have the next worker be what ``settings`` say."""
        process = WorkerProcess(self, settings)
        self._loop.call_soon_threadsafe(self._want, process)
        return process

    def add(self, worker: PlacedWorker) -> None:
        """Take another worker."""
        self._free.append(worker)
        self._match()

    def discard(self, process: WorkerProcess) -> None:
        """End a process."""
        worker = process.worker
        # Not where it has ended already: its number may be another process' by now
        if worker is not None and process.how is None and worker.where.node == self._node:
            # A stopped process is gone at once; Ray would ask it to go, and wait for seconds
            with suppress(ProcessLookupError, PermissionError):
                os.kill(worker.where.pid, signal.SIGKILL)
        self._loop.call_soon_threadsafe(self._discard, process)

    def _discard(self, process: WorkerProcess) -> None:
        if process in self._wanting:
            self._wanting.remove(process)
        elif (worker := process.worker) is not None:
            process.worker = None
            ray.kill(worker.actor)
            self._on_vacancy(worker.bundle)

    def _want(self, process: WorkerProcess) -> None:
        self._wanting.append(process)
        self._match()

    def _match(self) -> None:
        while self._free and self._wanting:
            process = self._wanting.popleft()
            process.worker = self._free.popleft()
            watch = asyncio.create_task(self._watch(process, process.worker))
            self._watches.add(watch)
            watch.add_done_callback(self._watches.discard)

    async def _watch(self, process: WorkerProcess, worker: PlacedWorker) -> None:
        """Run a worker until it ends: it only does when told to, or when its process dies."""
        try:
            await worker.actor.run.remote(process.settings)
            process.how = "ended"
        except RayError as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            process.how = f"died: {type(error).__name__} {reason}"
        if process.worker is not None:
            self._on_end()
