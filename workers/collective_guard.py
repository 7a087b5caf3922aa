"""A way out of collectives that other ranks will never finish, for backends that have none of their own (NCCL)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

logger = logging.getLogger(__name__)
_NEVER_SET = "end"
_LOOK_S = 0.1
"""How soon the thread sees what has changed, closing included."""
_END_S = 30.0
"""What a backend may take to abort; a rank that has not by then is of no use."""


class CollectiveGuard:
    """Calls ``abort`` from a thread of its own when a step takes longer than ``timeout_s``, or ``store`` goes away.

    NCCL's collectives are kernels that wait on the device, in a replayed graph too, where torch's watchdog sees none;
    and whoever waits for the device waits with them. Aborting their communicator ends them, and what they leave is
    worth nothing. ``store``: a connection of this guard's alone to where the ranks of the group meet, which the
    coordinator closes when it counts one of them as lost.
    """

    def __init__(self, store: dist.Store, timeout_s: float, abort: Callable[[], None]) -> None:
        self._store, self._timeout_s, self._abort = store, timeout_s, abort
        self._look = timedelta(seconds=min(_LOOK_S, timeout_s / 4))
        self._until_s: float | None = None
        self._is_left = False
        self.reason: str | None = None
        """Why collectives were aborted, once they have been."""
        self._thread = threading.Thread(target=self._watch, name="collective-guard", daemon=True)
        self._thread.start()

    def arm(self) -> None:
        """Count ``timeout_s`` from now: a step begins, or what it took so far was this rank's own doing."""
        self._until_s = time.monotonic() + self._timeout_s

    def disarm(self) -> None:
        """Count no longer: no step is under way."""
        self._until_s = None

    def check(self) -> None:
        """Raise ``RuntimeError`` if collectives have been aborted, so that what they left is worth nothing."""
        if self.reason is not None:
            raise RuntimeError(f"collectives were aborted: {self.reason}")

    def give_up(self) -> None:
        """Have collectives aborted, unless they have been: the group is left.

        Leaving in another way would wait for ranks that may be no more.
        """
        self._is_left = True

    def close(self) -> None:
        """Wait until collectives have been aborted, for which NCCL waits until no graph has any."""
        self.give_up()
        self._thread.join(_END_S)
        if self._thread.is_alive():
            raise RuntimeError(f"collectives could not be aborted within {_END_S:g} s")

    def _watch(self) -> None:
        while (reason := self._look_around()) is None:
            pass
        self.reason = reason
        if not self._is_left:
            logger.warning("aborting collectives: %s", reason)
        try:
            self._abort()
        except Exception:  # the backend's: whoever closes this guard joins another group, or ends
            logger.exception("collectives could not be aborted")

    def _look_around(self) -> str | None:
        try:
            self._store.wait([_NEVER_SET], self._look)
        except dist.DistStoreError:  # the moment has passed
            until_s = self._until_s
            if until_s is not None and time.monotonic() > until_s:
                return f"a step took more than {self._timeout_s:g} s"
        except dist.DistNetworkError:
            return "the coordinator gave the group up"
        return "the group was left" if self._is_left else None
