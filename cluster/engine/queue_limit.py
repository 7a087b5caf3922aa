"""How many requests may wait, and how long one that is refused had better stay away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .backend import QueueFullError

_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
"""openai's client waits as told for up to a minute."""
_MEMORY_S = 60.0
"""The rate at which the queue drains is measured over half of this to all of it."""


class QueueLimit:
    """Refuses requests that would wait behind ``max_queued_requests`` others.

    ``num_places``: requests that can run at once. `take` is called by any thread, the rest by the engine's, so that a
    request is refused at once and need not wait for a step to end.
    """

    def __init__(
        self, max_queued_requests: int, num_places: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_queued, self._clock = max_queued_requests, clock
        self._lock = threading.Lock()
        self._left = max_queued_requests + num_places
        self._num_unseen = 0
        """Taken, but not yet with the scheduler."""
        self._queued_since: float | None = None
        self._num_drained = 0
        self.num_refused = 0

    def take(self, *, always: bool = False) -> None:
        """Let one more request in; raise ``QueueFullError`` if the queue is full, unless it is ``always`` let in."""
        with self._lock:
            if self._left <= 0 and not always:
                self.num_refused += 1
                retry_after_s = self._retry_after_s()
                raise QueueFullError(
                    f"{self._max_queued} requests are waiting already (max_queued_requests); "
                    f"try again in {retry_after_s:.0f} s",
                    retry_after_s,
                )
            self._left -= 1
            self._num_unseen += 1

    def seen(self) -> None:
        """One request that was let in is with the scheduler now, or was dropped on its way there."""
        with self._lock:
            self._num_unseen -= 1

    def update(self, num_waiting: int, num_open: int, num_drained: int) -> None:
        """Learn the scheduler's state after it has admitted what it could.

        ``num_open``: requests that could run besides those that do; ``num_drained``: requests that have left the queue
        since the last update.
        """
        with self._lock:
            self._left = self._max_queued + num_open - num_waiting - self._num_unseen
            now = self._clock()
            if not num_waiting:
                self._queued_since, self._num_drained = None, 0
                return
            if self._queued_since is None:
                self._queued_since = now
            elif now - self._queued_since > _MEMORY_S:
                self._queued_since, self._num_drained = now - _MEMORY_S / 2, self._num_drained // 2
            self._num_drained += num_drained

    def _retry_after_s(self) -> float:
        """Return how long the queue of now would take to drain at the pace it had; that of no request leaving yet."""
        elapsed = 0.0 if self._queued_since is None else self._clock() - self._queued_since
        estimate = self._max_queued * elapsed / max(1, self._num_drained)
        return min(max(estimate, _MIN_RETRY_S), _MAX_RETRY_S)
