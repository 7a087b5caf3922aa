"""The coordinator's end of the request plane: requests come in, every step's outputs go out, reader by reader.

A reader, which is an ingress, has one direct socket under CURVE. It may lag: ``WINDOW`` letters are on their way to it
at most, and what comes meanwhile is merged, so that it holds up nobody and what waits for it is bounded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import zmq

from ...workers.sampling_params import SamplingParams
from ..engine.backend import EngineDeadError, QueueFullError
from ..engine.mailbox import Mailbox
from ..engine.output import ABORT, RequestOutput
from ..speculation.options import SpeculationOptions
from .curve import CurveRouter, Ticket
from .loop_socket import LoopSocket
from .request_messages import (
    Abort,
    CoordinatorLetter,
    Outputs,
    ReaderLetter,
    Received,
    Refused,
    Renewed,
    Submit,
)

logger = logging.getLogger(__name__)
LEASE_S = 10.0
"""A side that is silent for so long is taken for dead by the other, where neither Ray nor the connection has told."""
RENEWALS = 5
"""In the time of a lease. Silence is counted in these: a side that was held up must not take that for the other's."""
WINDOW = 64
"""Letters that a reader need not have taken before it is sent another."""


class RequestSink(Protocol):
    """Where requests go: an `EngineThread`."""

    def submit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        speculation: SpeculationOptions,
        client: str,
        *,
        output_token_ids: Sequence[int] = (),
        age_s: float = 0.0,
        was_taken: bool = False,
    ) -> None:
        """Queue a request, see `Submit`.

        Raises ``ValueError`` naming the field, ``QueueFullError`` or ``EngineDeadError``.
        """
        ...

    def abort(self, request_id: str, reason: str = ABORT) -> None:
        """Drop a request; unknown or finished ones are ignored."""
        ...


@dataclass(slots=True)
class _Reader:
    ticket: Ticket
    num_silent: int = 0
    """Renewals that were due since its last letter."""
    num_sent: int = 0
    num_taken: int = 0
    """Letters that it says it has."""
    num_received: int = 0
    waiting: Mailbox = field(default_factory=Mailbox)
    request_ids: set[str] = field(default_factory=set)
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class RequestServer:
    """Serves readers that were given a ticket. Belongs to the running event loop; all methods are called on it."""

    def __init__(self, host: str, sink: RequestSink, *, lease_s: float = LEASE_S) -> None:
        self._sink, self._lease_s = sink, lease_s
        self._router = CurveRouter(host)
        self._socket = LoopSocket(self._router.socket, self._take)
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(ReaderLetter)
        self._readers: dict[str, _Reader] = {}
        self._reader_of: dict[str, str] = {}
        self._leases = asyncio.create_task(self._end_leases())

    def attach(self, reader_id: str) -> Ticket:
        """Admit a reader: what it connects with."""
        ticket = self._router.issue(reader_id)
        self._readers[reader_id] = _Reader(ticket)
        return ticket

    async def detached(self, reader_id: str) -> None:
        """Return when the reader has been forgotten."""
        if (reader := self._readers.get(reader_id)) is not None:
            await reader.gone.wait()

    def detach(self, reader_id: str) -> None:
        """Forget a reader and abort its requests; an unknown one is ignored."""
        reader = self._readers.pop(reader_id, None)
        if reader is None:
            return
        self._router.revoke(reader.ticket)
        reader.gone.set()
        for request_id in reader.request_ids:
            del self._reader_of[request_id]
            self._sink.abort(request_id, ABORT)

    def deliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Send each output to the reader that submitted its request; those of readers who have gone are dropped."""
        by_reader: dict[str, list[RequestOutput]] = {}
        for output in outputs:
            reader_id = self._reader_of.get(output.request_id)
            if reader_id is None:
                continue
            by_reader.setdefault(reader_id, []).append(output)
            if output.finish_reason is not None:
                self._forget(output.request_id)
        for reader_id, batch in by_reader.items():
            reader = self._readers[reader_id]
            if reader.num_sent - reader.num_taken < WINDOW:
                self._send(reader_id, Outputs(batch))
            else:
                reader.waiting.put(batch)

    def close(self) -> None:
        """Forget all readers and close the socket."""
        self._leases.cancel()
        for reader_id in list(self._readers):
            self.detach(reader_id)
        self._socket.close()
        self._router.close()

    def _take(self, frames: list[bytes]) -> None:
        reader_id = frames[0].decode()
        reader = self._readers.get(reader_id)
        if reader is None:  # its lease has ended, of which it is told by the end of its attachment
            return
        reader.num_silent = 0
        try:
            letter = self._decoder.decode(frames[1])
        except msgspec.MsgspecError as error:
            logger.error("reader %s is forgotten: it cannot be understood: %s", reader_id, error)
            self.detach(reader_id)
            return
        if letter.number != reader.num_received:
            logger.warning("reader %s is forgotten: letters from it were lost", reader_id)
            self.detach(reader_id)
            return
        reader.num_received += 1
        message = letter.message
        if isinstance(message, Submit):
            self._submit(reader_id, reader, message)
        elif isinstance(message, Abort):
            if self._reader_of.get(message.request_id) == reader_id:
                self._forget(message.request_id)
                self._sink.abort(message.request_id, message.reason)
        elif isinstance(message, Received):
            reader.num_taken = message.number
            if reader.waiting:
                self._send(reader_id, Outputs(reader.waiting.drain()))
        else:
            self._send(reader_id, Renewed())

    def _submit(self, reader_id: str, reader: _Reader, message: Submit) -> None:
        request_id = message.request_id
        try:
            if request_id in self._reader_of:
                raise ValueError(f"request_id: {request_id!r} is in use")
            self._sink.submit(
                request_id,
                message.prompt_token_ids,
                message.sampling,
                message.speculation,
                message.client,
                output_token_ids=message.output_token_ids,
                age_s=message.age_s,
                was_taken=message.was_taken,
            )
        except (ValueError, QueueFullError, EngineDeadError) as error:
            self._send(reader_id, Refused.because(request_id, error))
            return
        self._reader_of[request_id] = reader_id
        reader.request_ids.add(request_id)

    def _forget(self, request_id: str) -> None:
        self._readers[self._reader_of.pop(request_id)].request_ids.discard(request_id)

    def _send(self, reader_id: str, message: Outputs | Refused | Renewed) -> None:
        reader = self._readers.get(reader_id)
        if reader is None:
            return
        letter = CoordinatorLetter(reader.num_sent, message)
        try:
            self._socket.send([reader_id.encode(), self._encoder.encode(letter)])
        except zmq.ZMQError:  # its connection is gone, or full of what it does not read
            self.detach(reader_id)
        else:
            reader.num_sent += 1

    async def _end_leases(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / RENEWALS)
            for reader_id, reader in list(self._readers.items()):
                reader.num_silent += 1
                if reader.num_silent > RENEWALS:
                    self.detach(reader_id)
