"""The processes of a gang: one for every rank, and spares. One that is lost is fenced and never comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ...workers.model_info import RankInfo
from .curve import Ticket
from .step_plane import CoordinatorPlane


class RankProcess(Protocol):
    """A process of a gang, as whoever started it knows it."""

    def ended(self) -> str | None:
        """Return how it ended; None while it lives, as far as is known. Asked often: it must not wait."""
        ...

    def kill(self) -> None:
        """End it whatever it does, stopped processes too, and do not wait for that. Harmless where it has ended."""
        ...


@dataclass(slots=True, eq=False)
class Member:
    """One process and what it is."""

    name: str
    process: RankProcess
    rank: int | None
    """None: a spare."""
    info: RankInfo | None = None
    """What it has loaded."""
    is_ready: bool = False
    """A spare that waits for a rank."""
    ponged: int = 0
    """The last ping that it has answered."""


class Roster:
    """Who is which rank, and who is spare. ``launch(ticket, rank)`` starts a process without waiting for it."""

    def __init__(self, plane: CoordinatorPlane, launch: Callable[[Ticket, int | None], RankProcess]) -> None:
        self._plane, self._launch = plane, launch
        self._num_started = 0
        self.of_rank: dict[int, Member] = {}
        self.spares: list[Member] = []

    def __iter__(self) -> Iterator[Member]:
        return iter([*self.of_rank.values(), *self.spares])

    def find(self, name: str) -> Member | None:
        """Return the member of that name."""
        return next((member for member in self if member.name == name), None)

    def start(self, rank: int | None) -> Member:
        """Start a process that is ``rank``, or a spare."""
        name = f"process-{self._num_started}"
        self._num_started += 1
        member = Member(name, self._launch(self._plane.admit(name), rank), rank)
        if rank is None:
            self.spares.append(member)
        else:
            self.of_rank[rank] = member
        return member

    def take_rank(self, member: Member, rank: int) -> None:
        """Make a spare ``rank``."""
        self.spares.remove(member)
        member.rank = rank
        self.of_rank[rank] = member

    def lose(self, member: Member) -> None:
        """Fence a member and end its process."""
        self._plane.fence(member.name)
        member.process.kill()
        if member in self.spares:
            self.spares.remove(member)
        else:
            assert member.rank is not None
            del self.of_rank[member.rank]

    def ended(self) -> list[tuple[Member, str]]:
        """Return the members whose processes are known to have ended, and how."""
        return [(member, how) for member in self if (how := member.process.ended()) is not None]
