"""The requests of an ingress that have not ended: sent to the shortest queue, and on when its coordinator is lost."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from ...workers.sampling_params import SamplingParams
from ..engine.backend import EngineDeadError
from ..engine.output import ERROR, RequestOutput
from ..engine.output_router import OutputRouter
from ..speculation.options import AUTO, SpeculationOptions
from .request_client import RequestClient

logger = logging.getLogger(__name__)
_MAX_LOSSES = 3
"""Coordinators that may die under a request without a token in between: it may be what kills them."""
_AGAIN = "the gang that served this request is gone; send it again"
_NO_GANG = "no gang is serving at present; send the request again"


@dataclass(slots=True)
class _Live:
    """One request, as it would be sent now."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    speculation: SpeculationOptions
    client: str
    since_s: float
    token_ids: list[int] = field(default_factory=list)
    """Its output so far."""
    destination: Destination | None = None
    """What has it; None while it waits for one."""
    sent_as: str = ""
    """Its name there: another one each time, so that no answer to an earlier one fits it."""
    was_sent: bool = False
    num_losses: int = 0
    """Since its last token."""


class Destination:
    """A coordinator that requests can be sent to; takes what it says of them. Made by `LiveRequests.destination`.

    ``on_dead`` is called when it says that its engine is dead, or cannot be sent anything.
    """

    def __init__(self, requests: LiveRequests, on_dead: Callable[[str], None]) -> None:
        self._requests, self.on_dead = requests, on_dead
        self.client: RequestClient | None = None
        self.live: dict[str, _Live] = {}
        """What it has, by its name there."""
        self._changed = asyncio.Event()

    def attached(self, client: RequestClient) -> int:
        """Send what waits through ``client``; return how many of the requests another one had before."""
        self.client = client
        return self._requests.attach(self)

    def drain(self) -> None:
        """Send nothing more."""
        self._requests.close(self)

    async def emptied(self) -> None:
        """Wait until all that was sent has ended."""
        while self.live:
            self._changed.clear()
            await self._changed.wait()

    def detached(self) -> int:
        """It is lost: send what it had elsewhere, or keep that; return how many requests another one has already."""
        self._requests.close(self)
        self.client = None
        return self._requests.lose(self)

    def drop(self, name: str) -> _Live | None:
        """Forget a request."""
        self._changed.set()
        return self.live.pop(name, None)

    def deliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Hand outputs to their readers; an engine's death is no output, but a loss."""
        death = None
        for output in outputs:
            live = self.live.get(output.request_id)
            if live is None:
                continue
            if output.finish_reason == ERROR:
                death = output.error or "its engine is dead"
                output = replace(output, finish_reason=None, error=None)
            self._requests.take(live, output)
        if death is not None:
            self.on_dead(death)

    def refuse(self, request_id: str, error: Exception) -> None:
        """Tell a reader that its request was not taken, if another coordinator would not take it either."""
        live = self.live.get(request_id)
        if live is None:
            return
        if isinstance(error, EngineDeadError):
            self.on_dead(str(error))
        else:
            self._requests.refuse(live, error)


class LiveRequests:
    """Requests between ``router``, which has their readers, and the coordinators that are there.

    A request goes to the destination with the fewest. One that a coordinator has when it is lost is sent to another
    with its prompt, its output so far and its seed, so that its reader gets the tokens that it would have got, each
    once.
    While there is none, requests wait, for ``timeout_s`` at most; then they end with ``EngineDeadError``, and so does
    what comes until there is one. Belongs to one event loop.
    """

    def __init__(self, router: OutputRouter, timeout_s: float) -> None:
        self._router, self._timeout_s = router, timeout_s
        self.open: list[Destination] = []
        """Those that are sent requests, the one that got the last at the end."""
        self._live: dict[str, _Live] = {}
        self._num_sent = 0
        self._has_given_up = False
        self._patience: asyncio.TimerHandle | None = None
        self._wait()

    def destination(self, on_dead: Callable[[str], None]) -> Destination:
        """Return one that is not attached yet."""
        return Destination(self, on_dead)

    def submit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        speculation: SpeculationOptions = AUTO,
        client: str = "",
    ) -> None:
        """Send a request, or keep it until there is a coordinator; raises ``EngineDeadError`` if there is none."""
        if self._has_given_up:
            raise EngineDeadError(_NO_GANG)
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(63))
        live = _Live(request_id, list(prompt_token_ids), sampling, speculation, client, time.monotonic())
        self._live[request_id] = live
        self._send(live)

    def abort(self, request_id: str, reason: str) -> None:
        """Drop a request, whose reader has left."""
        live = self._live.pop(request_id, None)
        if live is not None and (destination := live.destination) is not None:
            destination.drop(live.sent_as)
            if destination.client is not None:
                with suppress(EngineDeadError):  # then there is nothing to abort
                    destination.client.abort(live.sent_as, reason)

    def attach(self, destination: Destination) -> int:
        """Send what waits to one that has come; return how many of the requests another one had before."""
        self.open.append(destination)
        self._has_given_up = False
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        waiting = [live for live in self._live.values() if live.destination is None]
        for live in waiting:
            self._send(live)
        return sum(live.num_losses > 0 and live.destination is not None for live in waiting)

    def close(self, destination: Destination) -> None:
        """Send it nothing more; ignored if it is sent nothing."""
        if destination in self.open:
            self.open.remove(destination)
        if not self.open:
            self._wait()

    def lose(self, destination: Destination) -> int:
        """Send what a lost one had elsewhere, or keep that; return how many requests another one has already."""
        lost = list(destination.live.values())
        destination.live.clear()
        if lost and not self.open:  # one that had been sent nothing for long had these all the same
            self._has_given_up = False
            self._wait()
        for live in lost:
            live.destination = None
            live.num_losses += 1
            if live.num_losses > _MAX_LOSSES:
                del self._live[live.request_id]
                gone = f"the gang that served this request was lost {live.num_losses} times; send it again"
                self._router.refuse(live.request_id, EngineDeadError(gone))
            else:
                self._send(live)
        return sum(live.destination is not None for live in lost)

    def take(self, live: _Live, output: RequestOutput) -> None:
        """Hand an output to its reader."""
        num_known = len(live.token_ids) - output.offset
        if num_known >= 0 and (fresh := output.token_ids[num_known:]):  # the router complains of a gap
            live.token_ids += fresh
            live.num_losses = 0
        if output.finish_reason is not None:
            self._forget(live)
        self._router.deliver([replace(output, request_id=live.request_id)])

    def refuse(self, live: _Live, error: Exception) -> None:
        """End a request that was not taken."""
        self._forget(live)
        self._router.refuse(live.request_id, error)

    def _forget(self, live: _Live) -> None:
        del self._live[live.request_id]
        assert live.destination is not None, "it spoke of the request"
        live.destination.drop(live.sent_as)

    def _send(self, live: _Live) -> None:
        """Send to the destination with the fewest requests, of equals the one that has waited longest for another."""
        while self.open:
            destination = min(self.open, key=lambda one: len(one.live))
            assert destination.client is not None, "it is attached"
            name = f"{live.request_id}~{self._num_sent}"
            try:
                destination.client.submit(
                    name,
                    live.prompt_token_ids,
                    live.sampling,
                    live.speculation,
                    live.client,
                    output_token_ids=live.token_ids,
                    age_s=time.monotonic() - live.since_s,
                    was_taken=live.was_sent,
                )
            except EngineDeadError as error:
                self.close(destination)
                destination.on_dead(str(error))
                continue
            self._num_sent += 1
            live.destination, live.sent_as, live.was_sent = destination, name, True
            destination.live[name] = live
            self.open.remove(destination)
            self.open.append(destination)
            return

    def _wait(self) -> None:
        if self._patience is None and not self._has_given_up:
            self._patience = asyncio.get_running_loop().call_later(self._timeout_s, self._give_up)

    def _give_up(self) -> None:
        """End what waits; a gang that drains still has what it was sent."""
        self._patience = None
        self._has_given_up = True
        logger.warning("no gang has come in %g s", self._timeout_s)
        for live in [live for live in self._live.values() if live.destination is None]:
            del self._live[live.request_id]
            self._router.refuse(live.request_id, EngineDeadError(_AGAIN))
