"""The step plane: a direct, authenticated socket between the coordinator and every rank.

One ROUTER socket at the coordinator, one DEALER per rank, under CURVE. Actor calls take several times as long
(benchmarks/step_overhead).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from .curve import CurveDealer, CurveRouter, Ticket
from .messages import Answer, Command

_POLL_MS = 100


class CoordinatorPlane:
    """The coordinator's end. ``host``: the address that ranks reach it by; it listens on that address only."""

    def __init__(self, host: str, num_ranks: int) -> None:
        self._router = CurveRouter(host)
        self._socket = self._router.socket
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Answer)
        self.tickets = [self._router.issue(str(rank)) for rank in range(num_ranks)]

    def send(self, rank: int, command: Command) -> None:
        """Send to one rank; raise ``ConnectionError`` if it is not connected."""
        try:
            self._socket.send_multipart([str(rank).encode(), self._encoder.encode(command)])
        except zmq.ZMQError as error:
            raise ConnectionError(f"rank {rank} is not connected") from error

    def receive(self, deadline: float, check: Callable[[], None]) -> tuple[int, Any]:
        """Return the next (rank, answer).

        Raises ``TimeoutError`` at ``deadline`` (``time.monotonic``). ``check`` is called while nothing comes and may
        raise to give up earlier.
        """
        while not self._socket.poll(min(_POLL_MS, max(0, int(1000 * (deadline - time.monotonic()))))):
            check()
            if time.monotonic() >= deadline:
                raise TimeoutError
        identity, payload = self._socket.recv_multipart()
        return int(identity.decode()), self._decoder.decode(payload)

    def close(self) -> None:
        """Close the socket and its authenticator."""
        self._router.close()


class RankPlane:
    """A rank's end."""

    def __init__(self, ticket: Ticket) -> None:
        self._dealer = CurveDealer(ticket)
        self._socket = self._dealer.socket
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Command)

    def send(self, answer: Answer) -> None:
        """Send to the coordinator."""
        self._socket.send(self._encoder.encode(answer))

    def receive(self, closed: Callable[[], bool]) -> Any | None:
        """Return the next command; None once ``closed`` says that nobody will send one."""
        while not self._socket.poll(_POLL_MS):
            if closed():
                return None
        return self._decoder.decode(self._socket.recv())

    def close(self) -> None:
        """Close the socket."""
        self._dealer.close()
