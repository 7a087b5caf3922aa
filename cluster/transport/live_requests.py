"""The requests of an ingress that have not ended: lost with one coordinator, they are sent to the next."""

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

    prompt_token_ids: list[int]
    sampling: SamplingParams
    speculation: SpeculationOptions
    since_s: float
    token_ids: list[int] = field(default_factory=list)
    """Its output so far."""
    sent_as: str | None = None
    """Its name at the coordinator that has it: another one each time, so that no answer to an earlier one fits it."""
    was_sent: bool = False
    num_losses: int = 0
    """Since its last token."""


class LiveRequests:
    """Requests between ``router``, which has their readers, and one coordinator after another.

    A request that a coordinator has when it is lost is sent to the next one with its prompt, its output so far and its
    seed, so that its reader gets the tokens that it would have got, each once. While there is none, requests wait, for
    ``timeout_s`` at most; then they end with ``EngineDeadError``, and so does what comes until there is one.
    ``on_dead`` is called when the coordinator that serves says that its engine is dead. Belongs to one event loop.
    """

    def __init__(self, router: OutputRouter, timeout_s: float, on_dead: Callable[[str], None]) -> None:
        self._router, self._timeout_s, self._on_dead = router, timeout_s, on_dead
        self._live: dict[str, _Live] = {}
        self._names: dict[str, str] = {}
        """Request by its name at the coordinator."""
        self._num_sent = 0
        self._client: RequestClient | None = None
        self._has_given_up = False
        self._patience: asyncio.TimerHandle | None = None
        self._wait()

    def submit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        speculation: SpeculationOptions = AUTO,
    ) -> None:
        """Send a request, or keep it until there is a coordinator; raises ``EngineDeadError`` if there is none."""
        if self._has_given_up:
            raise EngineDeadError(_NO_GANG)
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(63))
        live = _Live(list(prompt_token_ids), sampling, speculation, time.monotonic())
        self._live[request_id] = live
        if self._client is not None:
            try:
                self._send(self._client, request_id, live)
            except EngineDeadError as error:
                self._on_dead(str(error))

    def abort(self, request_id: str, reason: str) -> None:
        """Drop a request, whose reader has left."""
        live = self._live.pop(request_id, None)
        if live is not None and live.sent_as is not None:
            self._names.pop(live.sent_as, None)
            if self._client is not None:
                with suppress(EngineDeadError):  # then there is nothing to abort
                    self._client.abort(live.sent_as, reason)

    def attached(self, client: RequestClient) -> int:
        """Send everything to another coordinator; return how many requests another one had before.

        Raises ``EngineDeadError`` if this one is lost already.
        """
        self._client = client
        for request_id, live in self._live.items():
            self._send(client, request_id, live)
        self._has_given_up = False
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        return sum(bool(live.num_losses) for live in self._live.values())

    def detached(self) -> None:
        """Keep everything for the next coordinator: this one is lost."""
        self._client = None
        self._names.clear()
        for request_id, live in list(self._live.items()):
            if live.sent_as is None:
                continue
            live.sent_as = None
            live.num_losses += 1
            if live.num_losses > _MAX_LOSSES:
                del self._live[request_id]
                lost = f"the gang that served this request was lost {live.num_losses} times; send it again"
                self._router.refuse(request_id, EngineDeadError(lost))
        self._wait()

    def deliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Hand outputs of the coordinator to their readers; an engine's death is no output, but a loss."""
        death = None
        for output in outputs:
            request_id = self._names.get(output.request_id)
            if request_id is None:
                continue
            live = self._live[request_id]
            output = replace(output, request_id=request_id)
            if output.finish_reason == ERROR:
                death = output.error or "its engine is dead"
                output = replace(output, finish_reason=None, error=None)
            elif output.finish_reason is not None:
                del self._live[request_id], self._names[live.sent_as or ""]
            num_known = len(live.token_ids) - output.offset
            if num_known >= 0 and (fresh := output.token_ids[num_known:]):  # the router complains of a gap
                live.token_ids += fresh
                live.num_losses = 0
            self._router.deliver([output])
        if death is not None:
            self._on_dead(death)

    def refuse(self, name: str, error: Exception) -> None:
        """Tell a reader that its request was not taken, if another coordinator would not take it either."""
        request_id = self._names.get(name)
        if request_id is None:
            return
        if isinstance(error, EngineDeadError):
            self._on_dead(str(error))
            return
        del self._live[request_id], self._names[name]
        self._router.refuse(request_id, error)

    def _send(self, client: RequestClient, request_id: str, live: _Live) -> None:
        name = f"{request_id}~{self._num_sent}"
        client.submit(
            name,
            live.prompt_token_ids,
            live.sampling,
            live.speculation,
            output_token_ids=live.token_ids,
            age_s=time.monotonic() - live.since_s,
            was_taken=live.was_sent,
        )
        self._num_sent += 1
        live.sent_as, live.was_sent = name, True
        self._names[name] = request_id

    def _wait(self) -> None:
        if self._patience is None and not self._has_given_up:
            self._patience = asyncio.get_running_loop().call_later(self._timeout_s, self._give_up)

    def _give_up(self) -> None:
        self._patience = None
        self._has_given_up = True
        logger.warning("no gang has come in %g s", self._timeout_s)
        self._live.clear()
        self._router.fail_all(_AGAIN)
