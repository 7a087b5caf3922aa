"""An ingress's end of the request plane: requests go out, their outputs come in and go to who reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec
import zmq

from ...workers.sampling_params import SamplingParams
from ..engine.backend import EngineDeadError
from ..engine.output import RequestOutput
from ..speculation.options import AUTO, SpeculationOptions
from .curve import CurveDealer, Ticket
from .loop_socket import LoopSocket
from .request_messages import Abort, CoordinatorLetter, Outputs, ReaderLetter, Received, Refused, Renew, Submit
from .request_server import LEASE_S, RENEWALS, WINDOW

_TAKEN = WINDOW // 4
"""Letters between two receipts."""


class Outbox(Protocol):
    """Who takes what a coordinator says of requests: an `OutputRouter`, or `LiveRequests` before one."""

    def deliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Take outputs."""
        ...

    def refuse(self, request_id: str, error: Exception) -> None:
        """Take note that a request was not taken."""
        ...


class RequestClient:
    """One reader of a `RequestServer`. What comes is given to ``router``, on the event loop that this was made on.

    When it cannot be relied on any more, because letters were lost or none comes, `run` raises ``EngineDeadError``.
    """

    def __init__(self, ticket: Ticket, router: Outbox, *, lease_s: float = LEASE_S) -> None:
        self._router, self._lease_s = router, lease_s
        self._dealer = CurveDealer(ticket)
        self._dealer.socket.linger = 0  # who closes has lost the other side, and must not wait for it
        self._socket = LoopSocket(self._dealer.socket, self._take)
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(CoordinatorLetter)
        self._num_sent = self._num_received = 0
        self._num_silent = 0
        """Renewals sent since the last letter came."""
        self._answered = asyncio.Event()
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closed = False

    def submit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        speculation: SpeculationOptions = AUTO,
        client: str = "",
        *,
        output_token_ids: Sequence[int] = (),
        age_s: float = 0.0,
        was_taken: bool = False,
    ) -> None:
        """Send a request; if it is refused, the reader learns why. Raises ``EngineDeadError``.

        ``output_token_ids``, ``age_s`` and ``was_taken``: see `Submit`.
        """
        prompt, output = list(prompt_token_ids), list(output_token_ids)
        self._send(Submit(request_id, prompt, sampling, speculation, client, output, age_s, was_taken))

    def abort(self, request_id: str, reason: str) -> None:
        """Drop a request; raises ``EngineDeadError``."""
        self._send(Abort(request_id, reason))

    async def connected(self) -> None:
        """Wait until the coordinator has answered; raises ``EngineDeadError`` if it does not."""
        self._send(Renew())
        try:
            await asyncio.wait_for(self._answered.wait(), self._lease_s)
        except TimeoutError:
            raise EngineDeadError("the coordinator does not answer on the request plane") from None

    async def run(self) -> None:
        """Keep the lease; raises ``EngineDeadError`` when the other side is lost."""
        while True:
            await asyncio.wait({self._lost}, timeout=self._lease_s / RENEWALS)
            if self._lost.done():
                self._lost.result()
            if self._num_silent == RENEWALS:
                raise EngineDeadError("the coordinator is silent")
            self._num_silent += 1
            self._send(Renew())

    def close(self) -> None:
        """Close the socket; what is submitted from now on raises ``EngineDeadError``."""
        self._closed = True
        self._lost.cancel()
        self._socket.close()
        self._dealer.close()

    def _take(self, frames: list[bytes]) -> None:
        self._num_silent = 0
        try:
            letter = self._decoder.decode(frames[0])
        except msgspec.MsgspecError as error:
            self.lose(f"the coordinator cannot be understood: {error}")
            return
        if letter.number != self._num_received:
            self.lose(f"letters {self._num_received} to {letter.number - 1} of the coordinator were lost")
            return
        self._num_received += 1
        message = letter.message
        if isinstance(message, Outputs):
            self._router.deliver(message.outputs)
        elif isinstance(message, Refused):
            self._router.refuse(message.request_id, message.error())
        else:
            self._answered.set()
        if self._num_received % _TAKEN == 0:
            try:
                self._send(Received(self._num_received))
            except EngineDeadError as error:
                self.lose(str(error))

    def _send(self, message: Submit | Abort | Renew | Received) -> None:
        if self._closed:
            raise EngineDeadError("the gang that served this request is gone; send it again")
        try:
            self._socket.send([self._encoder.encode(ReaderLetter(self._num_sent, message))])
        except zmq.Again:
            raise EngineDeadError("the coordinator takes no requests at present; send the request again") from None
        self._num_sent += 1

    def lose(self, why: str) -> None:
        """Give the other side up: `run` raises ``EngineDeadError``."""
        if not self._lost.done():
            self._lost.set_exception(EngineDeadError(why))
