"""What one rank does all day: load, then one step after another. One thread owns socket, process group and model."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...router.placement import Placement, PlacementVersion
from ...workers import process_group
from ...workers.collective_guard import CollectiveGuard
from ...workers.launched_step import LaunchedStep
from ...workers.loader import DenseModel
from ...workers.plan import RankError, RankPlan
from ...workers.runner import ModelRunner
from ..config import EngineConfig
from ..engine.ranks import make_runner, prepare
from .curve import Ticket
from .messages import (
    Answer,
    Assign,
    Assigned,
    Done,
    Failed,
    Loaded,
    Ping,
    Pong,
    Ready,
    Refused,
    Regroup,
    Regrouped,
    Run,
)
from .step_plane import RankPlane

MakeRunner = Callable[[EngineConfig, int, Placement | None, DenseModel | None], ModelRunner]


@dataclass(frozen=True, slots=True)
class RankSettings:
    """Everything a process is told when it starts, or when another coordinator takes it over."""

    config: EngineConfig
    ticket: Ticket
    node: str
    """Address of the process' machine; empty where whoever starts the process finds it out there."""
    rank: int | None = None
    """The rank it is to be; None: a spare, which is told later."""
    placed: PlacementVersion | None = None
    """Where experts are, as `placement_of` says: this machine may not have its file. None: equal runs of them."""


class RankLoop:
    """One process of a gang. It keeps its shard from one coordinator to the next."""

    def __init__(self, make: MakeRunner = make_runner) -> None:
        self._make = make
        self._runner: ModelRunner | None = None
        self._dense: DenseModel | None = None
        """What a spare has of the model."""
        self._failed_generation: int | None = None
        """Of a step that failed here: what was planned upon it must not run, or count."""
        self._guard: CollectiveGuard | None = None
        """Of the present process group, if its backend needs one."""
        self._running: LaunchedStep | None = None
        """A step that has been launched, and not answered."""
        self._plans_come_ahead = True
        """Whether the last plan came before the step before it had been answered."""

    def serve(self, settings: RankSettings, closed: Callable[[], bool] = lambda: False) -> None:
        """Serve a coordinator until it says to close, or until ``closed`` says that it is gone."""
        plane = RankPlane(settings.ticket)
        try:
            torch.set_num_threads(settings.config.threads_per_rank)
            if self._runner is not None:
                self._runner.generation = -1  # this coordinator counts anew
                self._failed_generation = None
                plane.send(_as_loaded(self._runner))
            elif settings.rank is not None:
                plane.send(self._load(settings, settings.rank, settings.placed))
            else:
                self._dense = prepare(settings.config)
                plane.send(Ready())
            while True:
                command = self._next(plane, closed)
                if isinstance(command, Run):
                    self._run(plane, command.plan)
                elif isinstance(command, Regroup):
                    # Whoever says so has given up what runs, which may wait for a rank that is no more
                    self._running = self._failed_generation = None
                    plane.send(self._regroup(settings, command))
                elif isinstance(command, Assign):
                    plane.send(Assigned(command.rank))
                    plane.send(self._load(settings, command.rank, command.placed or settings.placed))
                elif isinstance(command, Ping):
                    self._answer(plane)
                    plane.send(Pong(command.number))
                else:
                    return
        finally:
            self._running = None
            plane.close()
            self._leave()

    def _loaded(self) -> ModelRunner:
        assert self._runner is not None, "a spare is assigned a rank first"
        return self._runner

    def _next(self, plane: RankPlane, closed: Callable[[], bool]) -> Any | None:
        """Return the next command; the step that runs is answered if it ends before one comes."""
        if self._running is None:
            return plane.receive(closed)
        # A coordinator that needs this step's tokens for the next plan sends nothing before: then wait for them alone
        command = plane.receive_before(self._has_ended if self._plans_come_ahead else lambda: True)
        if command is not None:
            self._plans_come_ahead = True
            return command
        answer = self._finish()
        self._plans_come_ahead = plane.has_command()
        plane.send(answer)
        return plane.receive(closed)

    def _run(self, plane: RankPlane, plan: RankPlan) -> None:
        """Launch a step, behind the one that runs if that can be; else, that one is answered first.

        A step stays unanswered as long as another may be launched behind it.
        """
        runner, running = self._loaded(), self._running
        if running is not None and not runner.can_follow(plan, running):
            self._answer(plane)
            running = None
        if self._guard is not None and not runner.has_to_compile(plan):
            self._guard.arm()
        try:
            self._refuse(plan)
            step = runner.launch(plan, running)
        except Exception as error:  # whatever a model or a collective raises, the step is void and the rank lives on
            self._answer(plane)
            plane.send(self._failed(plan, error))
            return
        self._answer(plane)
        self._running = step
        if self._guard is not None:
            self._guard.arm()
        if plan.generation == self._failed_generation or not runner.can_be_followed(step):
            self._answer(plane)

    def _answer(self, plane: RankPlane) -> None:
        """Wait for the step that runs, if one does, and say what came of it."""
        if self._running is not None:
            plane.send(self._finish())

    def _finish(self) -> Answer:
        step, self._running = self._running, None
        assert step is not None, "one runs"
        try:
            self._refuse(step.plan)
            result = self._loaded().finish(step)
            if self._guard is not None:
                self._guard.check()
            return Done(result)
        except Exception as error:  # likewise
            return self._failed(step.plan, error)
        finally:
            if self._guard is not None:
                self._guard.disarm()

    def _has_ended(self) -> bool:
        assert self._running is not None, "one runs"
        try:
            return self._running.has_ended()
        except RuntimeError:  # the device's, which whoever finishes the step is told as well
            return True

    def _refuse(self, plan: RankPlan) -> None:
        if plan.generation == self._failed_generation:
            raise RuntimeError("a step before this one has failed")

    def _failed(self, plan: RankPlan, error: Exception) -> Failed:
        self._failed_generation = plan.generation
        # A device that no longer computes never will again in this process: raised here, that ends it
        self._loaded().check_device()
        if self._guard is not None and self._guard.reason is not None:
            self._loaded().disconnect()  # its abort waits for that
        message = f"{type(error).__name__}: {error}"
        return Failed(RankError(plan.generation, plan.step_id, self._loaded().rank, message))

    def _regroup(self, settings: RankSettings, command: Regroup) -> Answer:
        runner = self._loaded()
        try:
            self._leave()
            if command.placed is not None:
                runner.settle(command.placed)
            collectives = process_group.join(
                command.store,
                runner.rank - sum(rank < runner.rank for rank in command.absent),
                runner.num_ranks - len(command.absent),
                node=settings.node,
                timeout_s=settings.config.step_timeout_s,
                device=runner.device,
            )
            self._guard = collectives.guard
            runner.connect(collectives, command.absent)
        except Exception as error:  # torch.distributed has no common error type
            return Regrouped(command.epoch, f"{type(error).__name__}: {error}")
        return Regrouped(command.epoch)

    def _leave(self) -> None:
        """Leave the process group, once nothing holds it that it would wait for."""
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.give_up()
        if self._runner is not None:
            self._runner.disconnect()
        if guard is not None:
            guard.close()
        process_group.leave()

    def _load(self, settings: RankSettings, rank: int, placed: PlacementVersion | None) -> Answer:
        dense, self._dense = self._dense, None
        try:
            self._runner = self._make(settings.config, rank, placed.placement if placed else None, dense)
        except ValueError as error:
            return Refused(str(error))
        except Exception:  # a broken installation or too little memory: say it where it can be read
            return Refused(f"rank {rank} could not load: {traceback.format_exc(limit=-3)}")
        if self._runner.mover is not None and placed is not None:
            self._runner.mover.present = placed
        return _as_loaded(self._runner)


def run_rank(
    settings: RankSettings,
    closed: Callable[[], bool] = lambda: False,
    make: MakeRunner = make_runner,
) -> None:
    """Be a process of a gang for one coordinator; see `RankLoop.serve`."""
    RankLoop(make).serve(settings, closed)


def _as_loaded(runner: ModelRunner) -> Loaded:
    return Loaded(runner.info, None if runner.mover is None else runner.mover.present)
