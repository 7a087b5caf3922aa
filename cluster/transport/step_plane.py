"""The step plane: a direct, authenticated socket between the coordinator and every process of its gang.

One ROUTER socket at the coordinator, one DEALER per process, under CURVE. Actor calls take several times as long
(benchmarks/step_overhead).
"""

from __future__ import annotations

import select
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import zmq

from .curve import CurveDealer, CurveRouter, Ticket
from .messages import Answer, Close, Command

_POLL_MS = 100
_PAUSE_S = 20e-6
"""Linux makes 70 to 90 us of it, and a core is busy for a sixth of the time. So late the end of a step may be noticed,
if no other has been launched behind it."""


class CoordinatorPlane:
    """The coordinator's end. ``host``: the address that ranks reach it by; it listens on that address only."""

    def __init__(self, host: str) -> None:
        self._router = CurveRouter(host)
        self._socket = self._router.socket
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Answer)
        self._tickets: dict[str, Ticket] = {}

    def admit(self, name: str) -> Ticket:
        """Let a process in: what it connects with. A name is never used twice."""
        assert name not in self._tickets
        self._tickets[name] = self._router.issue(name)
        return self._tickets[name]

    def fence(self, name: str) -> None:
        """Hear nothing more of a process, whatever it does; should it come back, it is told to close."""
        self._router.revoke(self._tickets.pop(name))
        with suppress(ConnectionError):
            self.send(name, Close())

    def send(self, name: str, command: Command) -> None:
        """Send to one process; raise ``ConnectionError`` if it is not connected."""
        try:
            self._socket.send_multipart([name.encode(), self._encoder.encode(command)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise ConnectionError(f"{name} is not connected") from error

    def receive(self, timeout_s: float) -> tuple[str, Any] | None:
        """Return the next (name, answer); None when none has come after ``timeout_s``."""
        if not self._socket.poll(max(0, int(1000 * timeout_s))):
            return None
        identity, payload = self._socket.recv_multipart()
        name = identity.decode()
        if name not in self._tickets:
            with suppress(ConnectionError):
                self.send(name, Close())
            return None
        return name, self._decoder.decode(payload)

    def close(self) -> None:
        """Close the socket and its authenticator."""
        self._router.close()


class RankPlane:
    """A rank's end."""

    def __init__(self, ticket: Ticket) -> None:
        self._dealer = CurveDealer(ticket)
        self._socket = self._dealer.socket
        self._descriptor: int = self._socket.fd  # type: ignore[assignment]
        """Readable when something may have come, which only the socket itself can tell."""
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

    def receive_before(self, has_ended: Callable[[], bool]) -> Any | None:
        """Return the next command; None once there is none and ``has_ended`` says that nobody need wait for it.

        A command wakes this thread at once; ``has_ended`` is asked between pauses.
        """
        while not self.has_command():
            if has_ended():
                return None
            select.select([self._descriptor], [], [], _PAUSE_S)
        return self._decoder.decode(self._socket.recv())

    def has_command(self) -> bool:
        """Whether a command has come."""
        events: int = self._socket.getsockopt(zmq.EVENTS)  # type: ignore[assignment]
        return bool(events & zmq.POLLIN)

    def close(self) -> None:
        """Close the socket."""
        self._dealer.close()
