"""Ranks in processes of their own, driven over the step plane."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ...router.placement import Placement
from ...workers.model_info import RankInfo
from ...workers.plan import RankResult, StepFailedError, StepPlan, StepResult
from ...workers.process_group import open_store
from ..config import EngineConfig
from ..engine.backend import EngineDeadError
from .messages import Close, Done, Failed, Loaded, Refused, Regroup, Regrouped, Run
from .rank_loop import RankSettings
from .step_plane import CoordinatorPlane

_DEADLINES = 2.0
"""Ranks leave a hung collective by themselves, at most one deadline after they entered it, which may be as late as the
deadline itself. So a rank that has not answered after two is stuck or gone."""


class RemoteRanks:
    """All ranks of a gang. Create it, start a process for each of ``settings``, then ``wait_loaded``.

    ``check`` raises ``EngineDeadError`` when a rank's process is known to be gone; it is asked while nothing comes.
    ``placement``: what the file that ``config`` names holds.
    """

    def __init__(
        self,
        config: EngineConfig,
        host: str,
        nodes: list[str],
        check: Callable[[], None],
        placement: Placement | None = None,
    ) -> None:
        assert len(nodes) == config.expert_parallel_size
        self._config, self._check = config, check
        self._store, address = open_store(host)
        self._plane = CoordinatorPlane(host, len(nodes))
        self.settings = [
            RankSettings(config, ticket, address, node, placement)
            for ticket, node in zip(self._plane.tickets, nodes, strict=True)
        ]
        self.infos: list[RankInfo] = []
        self.meanwhile: Callable[[], None] = lambda: None
        """Called once in a step, when every rank has its plan: for work that is not to hold them up."""
        self._epoch = 0

    def wait_loaded(self, on_loaded: Callable[[RankInfo], None] = lambda _: None) -> None:
        """Wait for every rank to load and join the first process group.

        Raises ``ValueError`` for what the user can mend, ``EngineDeadError`` for a rank that died or took too long.
        """
        loaded: dict[int, RankInfo] = {}
        deadline = time.monotonic() + self._config.load_timeout_s
        while len(loaded) < len(self.settings):
            rank, answer = self._receive(deadline, "load")
            if isinstance(answer, Refused):
                raise ValueError(answer.message)
            if isinstance(answer, Loaded):
                loaded[rank] = answer.info
                on_loaded(answer.info)
        self.infos = [loaded[rank] for rank in range(len(loaded))]
        self.recover(0)

    def step(self, plan: StepPlan) -> StepResult:
        """Run one step on every rank; all answers are awaited even after a failure, so that none comes late."""
        started = time.perf_counter()
        try:
            for rank, part in enumerate(plan.ranks):
                self._plane.send(rank, Run(part))
        except ConnectionError as error:
            raise StepFailedError(str(error)) from error
        self.meanwhile()
        deadline = time.monotonic() + _DEADLINES * self._config.step_timeout_s
        results: dict[int, RankResult] = {}
        errors: dict[int, str] = {}
        while len(results) + len(errors) < len(plan.ranks):
            rank, answer = self._receive(deadline, "answer a step")
            # An answer to an earlier generation's step says nothing about this one
            if isinstance(answer, Done) and self._answers(plan, answer.result):
                results[rank] = answer.result
            elif isinstance(answer, Failed) and self._answers(plan, answer.error):
                errors[rank] = answer.error.message
        if errors:
            raise StepFailedError("; ".join(f"rank {rank}: {errors[rank]}" for rank in sorted(errors)))
        return StepResult([results[rank] for rank in range(len(results))], time.perf_counter() - started)

    @staticmethod
    def _answers(plan: StepPlan, answer: Any) -> bool:
        return (answer.generation, answer.step_id) == (plan.generation, plan.step_id)

    def recover(self, generation: int) -> None:
        """Have all ranks meet in a new process group; a single rank needs none."""
        if len(self.settings) == 1:
            return
        self._epoch += 1
        try:
            for rank in range(len(self.settings)):
                self._plane.send(rank, Regroup(self._epoch))
        except ConnectionError as error:
            raise EngineDeadError(str(error)) from error
        deadline = time.monotonic() + _DEADLINES * self._config.step_timeout_s
        waiting = set(range(len(self.settings)))
        while waiting:
            rank, answer = self._receive(deadline, "regroup")
            if isinstance(answer, Regrouped) and answer.epoch == self._epoch:
                if answer.error:
                    raise EngineDeadError(f"rank {rank} cannot join the process group: {answer.error}")
                waiting.discard(rank)

    def _receive(self, deadline: float, what: str) -> tuple[int, Any]:
        try:
            return self._plane.receive(deadline, self._check)
        except TimeoutError:
            raise EngineDeadError(f"a rank did not {what} in time") from None

    def close(self) -> None:
        """Tell the ranks to stop and close the plane."""
        for rank in range(len(self.settings)):
            try:
                self._plane.send(rank, Close())
            except ConnectionError:
                continue
        self._plane.close()
