"""What an ingress and a coordinator say to each other on the request plane. Encoded as MessagePack, never pickled."""

from __future__ import annotations

from typing import Literal

import msgspec

from ...workers.sampling_params import SamplingParams
from ..engine.backend import EngineDeadError, QueueFullError
from ..engine.output import RequestOutput
from ..speculation.options import SpeculationOptions


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Serve this request; `Outputs` follow, or `Refused`."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    speculation: SpeculationOptions
    client: str = ""
    """Whose it is."""
    output_token_ids: list[int] = []
    """What another coordinator has generated of it: outputs begin after these."""
    age_s: float = 0.0
    """How long ago the request came."""
    was_taken: bool = False
    """Another coordinator had taken it, so it is not refused because many wait."""


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Drop a request; ``reason``: see ``Engine.abort``."""

    request_id: str
    reason: str


class Renew(msgspec.Struct, tag=True, frozen=True):
    """The reader lives; `Renewed` follows."""


class Received(msgspec.Struct, tag=True, frozen=True):
    """The reader has taken all letters before ``number``."""

    number: int


class Outputs(msgspec.Struct, tag=True, frozen=True):
    """What one step added to this reader's requests, or several did."""

    outputs: list[RequestOutput]


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The request was not taken."""

    request_id: str
    kind: Literal["value", "queue_full", "dead"]
    message: str
    retry_after_s: float = 0.0

    @classmethod
    def because(cls, request_id: str, error: ValueError | QueueFullError | EngineDeadError) -> Refused:
        """Put what the engine raised into words."""
        if isinstance(error, QueueFullError):
            return cls(request_id, "queue_full", str(error), error.retry_after_s)
        return cls(request_id, "value" if isinstance(error, ValueError) else "dead", str(error))

    def error(self) -> ValueError | QueueFullError | EngineDeadError:
        """Return what the engine raised."""
        if self.kind == "queue_full":
            return QueueFullError(self.message, self.retry_after_s)
        return ValueError(self.message) if self.kind == "value" else EngineDeadError(self.message)


class Renewed(msgspec.Struct, tag=True, frozen=True):
    """The coordinator lives, and the reader is known to it."""


class ReaderLetter(msgspec.Struct, frozen=True, array_like=True):
    """From a reader to the coordinator. ``number`` counts its letters from 0: one that is missing was lost."""

    number: int
    message: Submit | Abort | Renew | Received


class CoordinatorLetter(msgspec.Struct, frozen=True, array_like=True):
    """From the coordinator to one reader; ``number`` as in `ReaderLetter`."""

    number: int
    message: Outputs | Refused | Renewed
