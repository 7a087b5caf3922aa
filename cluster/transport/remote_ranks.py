"""Ranks in processes of their own, driven over the step plane; those that are lost are replaced."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from ...router.placement import Placement, PlacementVersion
from ...workers.model_info import RankInfo
from ...workers.plan import RankError, RankResult, StepPlan, StepRefusedError, StepResult
from ...workers.process_group import open_store
from ..config import EngineConfig
from ..engine.backend import EngineDeadError
from ..engine.events import SILENT, EventLog
from ..engine.ranks import Replacement
from .absences import nothing_of
from .curve import Ticket
from .messages import Assign, Assigned, Close, Loaded, Refused, Regroup, Regrouped, Run
from .rank_loop import RankSettings
from .roster import Member, RankProcess, Roster
from .step_plane import CoordinatorPlane
from .step_round import results_of
from .watch import Watch

_ASSIGNED_S = 1.0
"""A spare does nothing but wait, so one that does not say at once that it has heard is stuck."""
_ATTEMPTS = 5
"""Times in one recovery that ranks are lost again or do not find each other; then the gang is given up."""
_SPARES_LOST = 3
"""Spares lost in a row before one was ready; then there will be no more."""


class RemoteRanks:
    """All ranks of a gang and its spares, each a process that ``launch`` starts without waiting for it.

    ``host``: this machine's address, where ranks connect to; ``node``: that of their machines, if it is the same for
    all, see `RankSettings.node`. ``placement``: what `placement_of` makes of ``config``. Call `start` before anything
    else.

    `recover` puts another process in the place of one that is lost (`Watch`), a spare if one is ready. The others keep
    weights and KV. Where there is no spare and the others hold all its experts, they go on without it until another
    process has loaded them.
    """

    def __init__(
        self,
        config: EngineConfig,
        host: str,
        launch: Callable[[RankSettings], RankProcess],
        placement: Placement | None = None,
        *,
        node: str,
        events: EventLog | None = None,
    ) -> None:
        self._config, self._host = config, host
        self._num_ranks = config.expert_parallel_size
        self._plane = CoordinatorPlane(host)

        self.placed = None if placement is None else PlacementVersion(0, placement)

        def start(ticket: Ticket, rank: int | None) -> RankProcess:
            return launch(RankSettings(config, ticket, node, rank, self.placed))

        self._roster = Roster(self._plane, start)
        self.events = EventLog() if events is None else events
        self._watch = Watch(config, self._plane, self._roster, self.events)
        self._lost, self._absent, self._steps = self._watch.lost, self._watch.absent, self._watch.steps
        self._epoch = 0
        self.infos: list[RankInfo] = []
        self.meanwhile: Callable[[], None] = lambda: None
        """Called once in a step, when every rank has its plan: for work that is not to hold them up."""

    def start(self, on_loaded: Callable[[RankInfo], None] = lambda _: None, *, num_adopted: int = 0) -> None:
        """Start all processes, wait for every rank to load, and join the first process group.

        The first ``num_adopted`` processes that are launched have served another coordinator: they say which rank they
        have loaded, if any. Raises ``ValueError`` for what the user can mend, ``EngineDeadError`` for a rank that died
        or took too long.
        """
        deadline_s = time.monotonic() + self._config.load_timeout_s
        self._adopt(num_adopted, on_loaded)
        missing = [rank for rank in range(self._num_ranks) if rank not in self._roster.of_rank]
        for rank in missing:
            self._fill(rank, deadline_s)
        self._refill_spares()
        self._watch.collect(missing, self._take_loaded, lambda: deadline_s, lambda loaded: on_loaded(loaded.info))
        if self._lost and not num_adopted:
            raise EngineDeadError(self.events.events()[-1].message)
        self.recover(0)

    def _adopt(self, num_adopted: int, on_loaded: Callable[[RankInfo], None]) -> None:
        """Hear what processes that have served another coordinator are."""
        for _ in range(num_adopted):
            self._roster.start(None)
        asked_s = time.monotonic()
        # One that was in a collective when the other coordinator died leaves it first
        deadline_s = asked_s + 2 * self._config.step_timeout_s
        while waiting := [member for member in self._roster.spares if not member.is_ready]:
            received = self._watch.receive(deadline_s)
            if received is not None and isinstance(received[1], Loaded):
                member, info = received[0], received[1].info
                if info.rank in self._roster.of_rank:  # it was lost, and did not hear of it
                    self._roster.lose(member)
                    continue
                member.info = info
                # Of a switch that the other coordinator did not see through all ranks may not have heard
                if (placed := received[1].placed) and self.placed and placed.number > self.placed.number:
                    self.placed = placed
                self._roster.take_rank(member, info.rank)
                on_loaded(info)
            elif time.monotonic() > deadline_s:
                for member in waiting:
                    self._watch.lose(member, SILENT, "a process did not join the coordinator in time", asked_s)
        self._watch.num_spares_lost = 0

    def step(self, plan: StepPlan) -> StepResult:
        """Run one step on every rank."""
        self.submit(plan)
        return self.collect(plan)

    def submit(self, plan: StepPlan) -> None:
        """Send a step to every rank; those that run another begin with it after that one."""
        self._watch.generation = plan.generation
        if returning := self._absent.returning:
            self._steps.begin(plan, f"rank {', '.join(map(str, returning))} has loaded, and joins the others")
            return
        for rank in self._watch.present:
            self._watch.send(rank, Run(plan.ranks[rank]))
        self._steps.begin(plan)

    def collect(self, plan: StepPlan) -> StepResult:
        """Wait for the oldest step that was submitted, whose answers are all awaited even after a failure."""
        step = self._steps.first(plan)
        if step.refusal is not None:
            raise StepRefusedError(step.refusal)
        self.meanwhile()

        def take(member: Member, _: Any) -> RankResult | RankError | None:
            return None if member.rank is None else step.answers.get(member.rank)

        # The first step of a shape compiles and captures: a part of loading
        timeout_s = self._config.load_timeout_s if plan.is_warm_up else None
        answers = self._watch.round(take, "answer a step", known=step.answers, timeout_s=timeout_s)
        results = results_of(answers, self._watch.present, {rank: loss.what for rank, loss in self._lost.items()})
        for rank in self._absent:
            results.insert(rank, nothing_of(rank, results[0]))
        return StepResult(results, self._steps.end())

    def tend(self, *, ping: bool = True) -> bool:
        """Notice processes that have ended while nothing ran, and with ``ping`` those that are stopped or out of reach.

        Returns whether that calls for `recover`.
        """
        self._watch.check_processes()
        if self._absent:
            self._watch.receive(time.monotonic())
        if ping and not self._lost:
            self._watch.ping()
        self._refill_spares()
        return bool(self._lost or self._absent.returning)

    def recover(self, generation: int) -> Sequence[Replacement]:
        """Replace lost ranks and have all meet in a new process group; a single rank needs none.

        Raises ``EngineDeadError`` if that cannot be done.
        """
        self._watch.generation = generation
        self._steps.clear()
        deadline_s = time.monotonic() + self._config.recovery_timeout_s
        replaced: dict[int, Replacement] = {}
        for _ in range(_ATTEMPTS):
            self._watch.check_processes()
            for rank in self._absent.returning:
                replaced[rank] = self._absent.end(rank)
            losses = dict(self._lost)
            if losses and self._can_do_without(losses):
                for rank, loss in losses.items():
                    self._lost.pop(rank)
                    self._roster.start(rank)
                    replaced[rank] = replace(loss, is_absent=True)
                    self._absent.begin(loss, time.monotonic() + self._config.load_timeout_s)
                losses = {}
            for rank, loss in losses.items():
                replaced[rank] = replace(loss, was_spare=self._fill(rank, deadline_s))
            self._watch.collect(losses, self._take_loaded, lambda: deadline_s)
            if losses and not self._lost:
                self._absent.came()
            error = "ranks are lost again" if self._lost else self._regroup()
            if error is None and not self._lost:
                present = {rank: self._info(rank) for rank in self._watch.present}
                self.infos[:] = [present.get(rank) or self.infos[rank] for rank in range(self._num_ranks)]
                self._refill_spares()
                return list(replaced.values())
            if time.monotonic() > deadline_s:
                break
        raise EngineDeadError(f"the ranks cannot be brought together: {error}")

    def _can_do_without(self, lost: Iterable[int]) -> bool:
        """Whether the others hold all experts, and nobody is there to take a place sooner than a new process.

        Experts that move would have to be followed, so they are waited for.
        """
        if self.placed is None or self._config.enable_eplb or self._roster.spares or not self.infos:
            return False
        if not self._absent.may_begin:
            return False
        return self.placed.placement.without({*lost, *self._absent}) is not None

    def _fill(self, rank: int, deadline_s: float) -> bool:
        """Put a process in ``rank``'s place; whether it was a spare."""
        self._lost.pop(rank, None)
        # A spare that starts is sooner there than a process that has yet to be started
        while self._roster.spares:
            ready = next((member for member in self._roster.spares if member.is_ready), None)
            if ready is not None:
                if self._assign(ready, rank):
                    return True
            elif time.monotonic() > deadline_s:
                self._watch.lose(self._roster.spares[0], SILENT, "a spare did not get ready in time", deadline_s)
            else:
                self._watch.receive(deadline_s)
        self._roster.start(rank)
        return False

    def _assign(self, spare: Member, rank: int) -> bool:
        asked_s = time.monotonic()
        self._watch.tell(spare, Assign(rank, self._moved))
        while spare in self._roster.spares:
            received = self._watch.receive(asked_s + _ASSIGNED_S)
            if received is not None and received[0] is spare and isinstance(received[1], Assigned):
                self._roster.take_rank(spare, rank)
                return True
            if time.monotonic() > asked_s + _ASSIGNED_S:
                self._watch.lose(spare, SILENT, "a spare did not answer", asked_s)
        return False

    def _refill_spares(self) -> None:
        if self._watch.num_spares_lost >= _SPARES_LOST:
            return
        for _ in range(self._config.num_spares - len(self._roster.spares)):
            self._roster.start(None)

    def _regroup(self) -> str | None:
        """Have all ranks meet in a new process group; return why one could not, if it was not lost itself."""
        if self._num_ranks == 1:
            return None
        self._epoch += 1
        self._watch.store, address = open_store(self._host)
        for rank in self._watch.present:
            self._watch.send(rank, Regroup(self._epoch, address, tuple(self._absent), self._moved))
            if self._lost:  # nobody need wait for it
                return "ranks are lost again"

        def take(_: Member, answer: Any) -> Any:
            return answer if isinstance(answer, Regrouped) and answer.epoch == self._epoch else None

        answers = self._watch.round(take, "regroup")
        return next((f"rank {rank}: {said.error}" for rank, said in answers.items() if said.error), None)

    def _take_loaded(self, member: Member, answer: Any) -> Any:
        if isinstance(answer, Refused):
            if self.infos:
                raise EngineDeadError(f"a replacement of rank {member.rank} cannot load: {answer.message}")
            raise ValueError(answer.message)
        if not isinstance(answer, Loaded):
            return None
        member.info = answer.info
        return answer

    @property
    def _moved(self) -> PlacementVersion | None:
        return self.placed if self._config.enable_eplb else None

    def _info(self, rank: int) -> RankInfo:
        info = self._roster.of_rank[rank].info
        assert info is not None, "it has loaded"
        return info

    def close(self) -> None:
        """Tell the processes to stop and close the plane."""
        for member in self._roster:
            try:
                self._plane.send(member.name, Close())
            except ConnectionError:
                continue
        self._plane.close()
