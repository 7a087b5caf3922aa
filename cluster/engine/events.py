"""What went wrong and what was done about it, and what was moved: one event per fault, recovery and rebalance."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

from .histogram import Histogram, HistogramSnapshot

logger = logging.getLogger(__name__)

FAULT, RECOVERY, REBALANCE = "fault", "recovery", "rebalance"
# What a fault was, and what a recovery recovered from
DIED = "died"
"""A process ended, or whoever watches it says so: its node's death is among these."""
SILENT = "silent"
"""A process did not answer by its deadline: it is stopped, or its link is."""
UNREACHABLE = "unreachable"
"""A process' connection was gone when it was to be told something."""
COORDINATOR_DIED = "coordinator_died"
RESUBMISSION = "resubmission"
"""An ingress that had lost its coordinator sent what was live to the next."""
# What became of a rebalance
FINISHED = "finished"
TIMED_OUT = "timed_out"
"""It took too long and was given up; experts that had been moved stay where they are."""
INTERRUPTED = "interrupted"
"""Ranks had to meet again in the middle of it."""

_DURATION_S = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0)
_NUM_KEPT = 1024


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a gang."""

    kind: str
    """fault, recovery or rebalance."""
    what: str
    """died, silent, unreachable or coordinator_died; of a recovery, what it recovered from, or resubmission; of a
    rebalance, finished, timed_out or interrupted."""
    message: str
    time_s: float = field(default_factory=time.time)
    """When: seconds since the epoch. A fault's is when it was noticed, the others' when they were over."""
    duration_s: float = 0.0
    """A fault: from when an answer was last expected until it was noticed. A recovery: from then until steps go on.
    A rebalance: from the look at the loads on."""
    generation: int = 0
    ranks: tuple[int, ...] = ()
    """The ranks that were lost."""
    expert_bytes_loaded: int = 0
    num_requests_replayed: int = 0
    num_experts_moved: int = 0

    def line(self) -> str:
        """Return it as one line of ``name=value`` for logs."""
        return " ".join(f"{name}={value!r}" for name, value in asdict(self).items() if name != "message")


@dataclass(frozen=True, slots=True)
class EventTotals:
    """Events since the log was made."""

    faults: dict[str, int]
    """By what they were."""
    recoveries: dict[str, int]
    """By what they recovered from."""
    recovery_s: HistogramSnapshot
    expert_bytes_loaded: int
    num_requests_replayed: int
    rebalances: dict[str, int] = field(default_factory=dict)
    """By what became of them."""
    expert_bytes_moved: int = 0
    num_experts_moved: int = 0


class EventLog:
    """Keeps the last 1024 events, totals of all, and writes each to the log. Any thread may use it.

    ``earlier``: events of the same gang before this log was made. ``on_event`` is called with each that is recorded.
    """

    def __init__(self, earlier: Iterable[Event] = (), on_event: Callable[[Event], object] = lambda _: None) -> None:
        self._on_event = on_event
        self._lock = threading.Lock()
        self._events: deque[Event] = deque(maxlen=_NUM_KEPT)
        self._faults: Counter[str] = Counter()
        self._recoveries: Counter[str] = Counter()
        self._recovery_s = Histogram(_DURATION_S)
        self._expert_bytes = self._num_replayed = 0
        self._rebalances: Counter[str] = Counter()
        self._bytes_moved = self._experts_moved = 0
        for event in earlier:
            self._add(event)

    def record(self, event: Event) -> None:
        """Take note of ``event``."""
        logger.log(logging.WARNING if event.kind == FAULT else logging.INFO, "%s; %s", event.message, event.line())
        self._add(event)
        self._on_event(event)

    def _add(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)
            if event.kind == FAULT:
                self._faults[event.what] += 1
                return
            if event.kind == REBALANCE:
                self._rebalances[event.what] += 1
                self._bytes_moved += event.expert_bytes_loaded
                self._experts_moved += event.num_experts_moved
                return
            self._recoveries[event.what] += 1
            self._recovery_s.observe(event.duration_s)
            self._expert_bytes += event.expert_bytes_loaded
            self._num_replayed += event.num_requests_replayed

    def events(self) -> list[Event]:
        """Return the events that are kept, oldest first."""
        with self._lock:
            return list(self._events)

    def totals(self) -> EventTotals:
        """Return the totals as they are now."""
        with self._lock:
            return EventTotals(
                dict(self._faults),
                dict(self._recoveries),
                self._recovery_s.snapshot(),
                self._expert_bytes,
                self._num_replayed,
                dict(self._rebalances),
                self._bytes_moved,
                self._experts_moved,
            )
