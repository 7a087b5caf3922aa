"""What the processes of a gang answer, and which of them are lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.distributed as dist

from ..config import EngineConfig
from ..engine.events import DIED, FAULT, SILENT, UNREACHABLE, Event, EventLog
from ..engine.ranks import Replacement
from .absences import Absences
from .deadline import Deadline
from .messages import Command, Done, Failed, Loaded, Ping, Pong, Ready, Refused
from .roster import Member, Roster
from .step_plane import CoordinatorPlane
from .step_round import StepRounds

logger = logging.getLogger(__name__)
_POLL_S = 0.02
"""How soon the end of a process is noticed while its answer is awaited."""
_PONG_S = 5.0
"""How long a spare that waits may take to say so, since one that is lost without need costs as much as one that is."""


class Watch:
    """Talks with the members of ``roster`` over ``plane``, hears them all, and fences and kills those that are lost.

    A process is lost that has ended, is not connected, or does not answer by its deadline (`Deadline`). Who takes its
    place is another's business.
    """

    def __init__(self, config: EngineConfig, plane: CoordinatorPlane, roster: Roster, events: EventLog) -> None:
        self._config, self._plane, self._roster, self._events = config, plane, roster, events
        self._num_ranks = config.expert_parallel_size
        self._num_pings = 0
        self.lost: dict[int, Replacement] = {}
        """Ranks that were lost and have no process group with the others yet."""
        self.absent = Absences()
        self.steps = StepRounds()
        self.generation = 0
        """Of the steps whose answers count."""
        self.num_spares_lost = 0
        """In a row, before they were ready."""
        self.store: dist.TCPStore | None = None
        """Where ranks met last. Let go when one is lost or fails: the others wait for it in a collective no longer."""

    @property
    def present(self) -> list[int]:
        """Ranks that the others do not go on without."""
        return [rank for rank in range(self._num_ranks) if rank not in self.absent]

    def send(self, rank: int, command: Command) -> None:
        """Tell a rank something, unless it is lost."""
        member = self._roster.of_rank.get(rank)
        if member is not None:
            self.tell(member, command)

    def tell(self, member: Member, command: Command) -> bool:
        """Tell a member something; it is lost where that cannot be."""
        try:
            self._plane.send(member.name, command)
        except ConnectionError:
            self.lose(member, UNREACHABLE, f"{_name_of(member)} is not connected", time.monotonic())
            return False
        return True

    def ping(self) -> None:
        """Ask all processes that wait whether they are there."""
        self._num_pings += 1
        number, asked_s = self._num_pings, time.monotonic()
        for spare in [spare for spare in self._roster.spares if spare.is_ready]:
            self.tell(spare, Ping(number))
        for rank in self.present:
            self.send(rank, Ping(number))

        def take(_: Member, answer: Any) -> Any:
            return answer if isinstance(answer, Pong) and answer.number == number else None

        self.round(take, "answer")
        while waiting := [spare for spare in self._roster.spares if spare.is_ready and spare.ponged < number]:
            if self.receive(asked_s + _PONG_S) is None and time.monotonic() > asked_s + _PONG_S:
                for spare in waiting:
                    self.lose(spare, SILENT, "a spare did not answer", asked_s)

    def round(
        self,
        take: Callable[[Member, Any], Any],
        what: str,
        known: Mapping[int, Any] | None = None,
        timeout_s: float | None = None,
    ) -> dict[int, Any]:
        """Collect the answer of every rank to what they were told; ``known``: those that have come already, by rank.

        ``timeout_s``: that of a step where absent.
        """
        deadline = Deadline(timeout_s or self._config.step_timeout_s, time.monotonic(), alone=self._num_ranks == 1)
        answers = dict(known or {})
        if answers:
            deadline.answered(time.monotonic())
        return answers | self.collect(
            [rank for rank in self.present if rank not in answers],
            take,
            lambda: deadline.at_s,
            lambda _: deadline.answered(time.monotonic()),
            what=what,
        )

    def collect(
        self,
        ranks: Iterable[int],
        take: Callable[[Member, Any], Any],
        deadline_s: Callable[[], float],
        on_answer: Callable[[Any], None] = lambda _: None,
        *,
        what: str = "load",
    ) -> dict[int, Any]:
        """Wait until each of ``ranks`` has given an answer that ``take`` returns, or is lost."""
        asked_s = time.monotonic()
        wanted = list(ranks)
        answers: dict[int, Any] = {}
        while waiting := [rank for rank in wanted if rank not in answers and rank not in self.lost]:
            received = self.receive(deadline_s())
            if received is not None:
                member, answer = received
                if member.rank in waiting and (taken := take(member, answer)) is not None:
                    answers[member.rank] = taken
                    on_answer(taken)
            elif time.monotonic() >= deadline_s():
                for member in [self._roster.of_rank[rank] for rank in waiting if rank not in self.lost]:
                    self.lose(member, SILENT, f"rank {member.rank} did not {what} in time", asked_s)
        return answers

    def receive(self, deadline_s: float) -> tuple[Member, Any] | None:
        """Return the next answer of a member; None after a moment without one, when ended processes are noticed."""
        received = self._plane.receive(min(_POLL_S, deadline_s - time.monotonic()))
        if received is None:
            self.check_processes()
            return None
        name, answer = received
        member = self._roster.find(name)
        if member is None:
            return None
        if isinstance(answer, Ready):
            member.is_ready, member.ponged = True, self._num_pings
            self.num_spares_lost = 0
        elif isinstance(answer, Pong):
            member.ponged = answer.number
        elif member.rank in self.absent:
            self._hear_absent(member, answer)
        elif isinstance(answer, Done | Failed) and member.rank is not None:
            # Ranks that wait for it in a collective need not wait for their timeout; of a step that has been given up
            # they are on their way to the next group
            if isinstance(answer, Failed) and answer.error.generation == self.generation:
                self.store = None
            self.steps.hear(member.rank, answer)
        return member, answer

    def _hear_absent(self, member: Member, answer: Any) -> None:
        if isinstance(answer, Loaded) and member.rank is not None:
            member.info = answer.info
            self.absent.loaded(member.rank)
        elif isinstance(answer, Refused):
            logger.error("a replacement of rank %s cannot load: %s", member.rank, answer.message)
            self.lose(member, DIED, f"a replacement of rank {member.rank} could not load", time.monotonic())

    def check_processes(self) -> None:
        """Notice processes that have ended, and those that take too long to end an absence."""
        now_s = time.monotonic()
        for rank in self.absent.overdue(now_s):
            self.lose(self._roster.of_rank[rank], SILENT, f"a replacement of rank {rank} did not load in time", now_s)
        for member, how in self._roster.ended():
            self.lose(member, DIED, f"the process of {_name_of(member)} {how}", time.monotonic())

    def lose(self, member: Member, what: str, message: str, since_s: float) -> None:
        """Take note that a member is lost: how (`Event.what`), why, and since when an answer had been expected.

        One that is lost already, as its end was noticed when its deadline passed, is not lost again.
        """
        if member not in self._roster:
            return
        now_s = time.monotonic()
        rank = member.rank
        self._roster.lose(member)
        if rank is None:
            self.num_spares_lost += not member.is_ready
        else:
            if not self.absent.lose(rank):
                # Ranks that wait for it to join them need not wait for their timeout
                self.store = None
            self.lost[rank] = Replacement(rank, what, now_s, was_spare=False)
        self._events.record(
            Event(
                FAULT,
                what,
                message,
                duration_s=now_s - since_s,
                generation=self.generation,
                ranks=() if rank is None else (rank,),
            )
        )


def _name_of(member: Member) -> str:
    return "a spare" if member.rank is None else f"rank {member.rank}"
