"""What one rank does all day: load, then one step after another. One thread owns socket, process group and model."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...router.placement import Placement, PlacementVersion
from ...workers import process_group
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
        """Of the last step, if that failed here: what was planned upon it must not run."""

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
                command = plane.receive(closed)
                if isinstance(command, Run):
                    plane.send(self._step(command.plan))
                elif isinstance(command, Regroup):
                    self._failed_generation = None
                    plane.send(_regroup(settings, self._loaded(), command))
                elif isinstance(command, Assign):
                    plane.send(Assigned(command.rank))
                    plane.send(self._load(settings, command.rank, command.placed or settings.placed))
                elif isinstance(command, Ping):
                    plane.send(Pong(command.number))
                else:
                    return
        finally:
            plane.close()
            if self._runner is not None:
                self._runner.disconnect()
            process_group.leave()

    def _loaded(self) -> ModelRunner:
        assert self._runner is not None, "a spare is assigned a rank first"
        return self._runner

    def _step(self, plan: RankPlan) -> Answer:
        runner = self._loaded()
        try:
            if plan.generation == self._failed_generation:
                raise RuntimeError("a step before this one has failed")
            self._failed_generation = None
            return Done(runner.step(plan))
        except Exception as error:  # whatever a model or a collective raises, the step is void and the rank lives on
            self._failed_generation = plan.generation
            return Failed(RankError(plan.generation, plan.step_id, runner.rank, f"{type(error).__name__}: {error}"))

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


def _regroup(settings: RankSettings, runner: ModelRunner, command: Regroup) -> Answer:
    try:
        if command.placed is not None:
            runner.settle(command.placed)
        runner.disconnect()
        collectives = process_group.join(
            command.store,
            runner.rank - sum(rank < runner.rank for rank in command.absent),
            runner.num_ranks - len(command.absent),
            node=settings.node,
            timeout_s=settings.config.step_timeout_s,
            device=runner.device,
        )
        runner.connect(collectives, command.absent)
    except Exception as error:  # torch.distributed has no common error type
        return Regrouped(command.epoch, f"{type(error).__name__}: {error}")
    return Regrouped(command.epoch)
