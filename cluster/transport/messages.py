"""What the coordinator and a rank say to each other on the step plane. Encoded as MessagePack, never pickled."""

from __future__ import annotations

import msgspec

from ...router.placement import PlacementVersion
from ...workers.model_info import RankInfo
from ...workers.plan import RankError, RankPlan, RankResult
from ...workers.process_group import StoreAddress


class Run(msgspec.Struct, tag=True, frozen=True):
    """Run one step."""

    plan: RankPlan


class Regroup(msgspec.Struct, tag=True, frozen=True):
    """Leave the process group and join the one that meets at ``store``; ``epoch`` is never used twice.

    ``placed``: where experts are; None where they stay.
    """

    epoch: int
    store: StoreAddress
    absent: tuple[int, ...] = ()
    """Ranks that are not to come; the others hold their experts as well."""
    placed: PlacementVersion | None = None


class Assign(msgspec.Struct, tag=True, frozen=True):
    """Be this rank from now on: `Assigned` follows at once, `Loaded` when its shard is in memory. Told to a spare.

    ``placed``: where experts are; None where they stay where they were when the spare was started.
    """

    rank: int
    placed: PlacementVersion | None = None


class Ping(msgspec.Struct, tag=True, frozen=True):
    """Say that you are there: `Pong` with the same ``number``."""

    number: int


class Close(msgspec.Struct, tag=True, frozen=True):
    """Stop serving."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """A spare waits for its rank."""


class Assigned(msgspec.Struct, tag=True, frozen=True):
    """A spare has heard which rank it is."""

    rank: int


class Pong(msgspec.Struct, tag=True, frozen=True):
    """The process waits for what comes next."""

    number: int


class Loaded(msgspec.Struct, tag=True, frozen=True):
    """The shard is in memory; ``placed`` says what it is of, where experts move."""

    info: RankInfo
    placed: PlacementVersion | None = None


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The configuration or checkpoint cannot be served; ``message`` names the field."""

    message: str


class Regrouped(msgspec.Struct, tag=True, frozen=True):
    """The process group of ``epoch`` stands; ``error`` if it does not."""

    epoch: int
    error: str | None = None


class Done(msgspec.Struct, tag=True, frozen=True):
    """One step ran."""

    result: RankResult


class Failed(msgspec.Struct, tag=True, frozen=True):
    """One step did not."""

    error: RankError


Command = Run | Regroup | Assign | Ping | Close
Answer = Ready | Assigned | Pong | Loaded | Refused | Regrouped | Done | Failed
