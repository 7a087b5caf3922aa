"""What one rank does all day: load, then one step after another. One thread owns socket, process group and model."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...router.placement import Placement
from ...workers import process_group
from ...workers.plan import RankError, RankPlan
from ...workers.runner import ModelRunner
from ..config import EngineConfig
from ..engine.ranks import make_runner
from .curve import Ticket
from .messages import Answer, Done, Failed, Loaded, Refused, Regroup, Regrouped, Run
from .step_plane import RankPlane


@dataclass(frozen=True, slots=True)
class RankSettings:
    """Everything a rank is told when it starts."""

    config: EngineConfig
    ticket: Ticket
    store: process_group.StoreAddress
    node: str
    """Address of the rank's machine."""
    placement: Placement | None = None
    """What the configuration's file of that name holds: this machine may not have it."""

    @property
    def rank(self) -> int:
        """This rank's number."""
        return int(self.ticket.identity)


def run_rank(
    settings: RankSettings,
    closed: Callable[[], bool] = lambda: False,
    make: Callable[[EngineConfig, int, Placement | None], ModelRunner] = make_runner,
) -> None:
    """Serve until told to close, or until ``closed`` says that the coordinator is gone."""
    plane = RankPlane(settings.ticket)
    try:
        torch.set_num_threads(settings.config.threads_per_rank)
        try:
            runner = make(settings.config, settings.rank, settings.placement)
        except ValueError as error:
            plane.send(Refused(str(error)))
            return
        except Exception:  # a broken installation or too little memory: say it where it can be read
            plane.send(Refused(f"rank {settings.rank} could not load: {traceback.format_exc(limit=-3)}"))
            return
        plane.send(Loaded(runner.info))
        while True:
            command = plane.receive(closed)
            if isinstance(command, Run):
                plane.send(_step(runner, command.plan))
            elif isinstance(command, Regroup):
                plane.send(_regroup(settings, runner, command.epoch))
            else:
                return
    finally:
        plane.close()
        process_group.leave()


def _step(runner: ModelRunner, plan: RankPlan) -> Answer:
    try:
        return Done(runner.step(plan))
    except Exception as error:  # whatever a model or a collective raises, the step is void and the rank lives on
        return Failed(RankError(plan.generation, plan.step_id, runner.rank, f"{type(error).__name__}: {error}"))


def _regroup(settings: RankSettings, runner: ModelRunner, epoch: int) -> Answer:
    try:
        process_group.join(
            settings.store,
            epoch,
            runner.rank,
            runner.num_ranks,
            node=settings.node,
            timeout_s=settings.config.step_timeout_s,
            backend="nccl" if runner.device.type == "cuda" else "gloo",
        )
    except Exception as error:  # torch.distributed has no common error type
        return Regrouped(epoch, f"{type(error).__name__}: {error}")
    runner.connect(None)
    return Regrouped(epoch)
