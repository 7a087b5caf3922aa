"""What captured graphs may take of a device's memory, and what they have taken. Pure: what is there has been measured.

Graphs share one pool of memory: what a step needs on the way is there for the next one, and only what it leaves for its
answer stays taken. So the first to be captured is the largest step, in whose memory all others find room; smaller ones
first would each need more than there is. Where the largest finds no room, smaller ones may: they need least, and gain
most by being replayed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class GraphRoom:
    """The room of one rank's graphs.

    ``most_bytes``: of all graphs; None for as much as ``reserve_bytes`` leaves of the device's free memory, which steps
    that are launched need.
    """

    most_bytes: int | None = None
    reserve_bytes: int = 0
    num_bytes: int = 0
    """Taken for graphs, used or not."""
    _kept_bytes: int = 0
    """Of the present pool, in use by what graphs leave."""
    _before: int = 0
    """Taken by pools that grow no more."""

    def objection(self, step_bytes: int, free_bytes: int) -> str:
        """Return why there is no room for the graph of a step that needs so much at once; nothing if there is.

        ``free_bytes``: of the device, with nothing cached.
        """
        needed = max(self.num_bytes, self._before + self._kept_bytes + step_bytes)
        if self.most_bytes is not None and needed > self.most_bytes:
            return f"graphs would take {_gib(needed)} of {_gib(self.most_bytes)} GiB"
        left = free_bytes - (needed - self.num_bytes)
        if left < self.reserve_bytes:
            return f"{_gib(left)} GiB would be left of {_gib(self.reserve_bytes)} for steps that are launched"
        return ""

    def take(self, grown_bytes: int, kept_bytes: int) -> None:
        """Count a graph by which the pool has grown, and of which so much stays in use."""
        self.num_bytes += grown_bytes
        self._kept_bytes += kept_bytes

    def begin_pool(self) -> None:
        """Graphs that come take memory of their own: what is there is shared no more."""
        self._before, self._kept_bytes = self.num_bytes, 0

    def close(self) -> None:
        """Let no more be captured: there was less memory than was thought, and will be when graphs are made anew."""
        self.most_bytes = self.num_bytes
        self.begin_pool()

    def clear(self) -> None:
        """There are no graphs any more."""
        self.num_bytes = self._kept_bytes = self._before = 0


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f}"
