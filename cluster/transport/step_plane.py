"""The step plane: a direct, authenticated socket between the coordinator and every rank.

One ROUTER socket at the coordinator, one DEALER per rank, under CURVE: only keys that the coordinator made and handed
out may connect, and everything is encrypted. Actor calls take several times as long
(benchmarks/step_overhead).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq
import zmq.auth.thread

from .messages import Answer, Command

LOOPBACK = "127.0.0.1"
_POLL_MS = 100


@dataclass(frozen=True, slots=True)
class PlaneTicket:
    """What a rank needs to connect; it holds a secret key, so it travels over trusted channels only."""

    rank: int
    address: str
    server_key: str
    public_key: str
    secret_key: str


class _KnownKeys:
    """Admits the ranks' keys and no others (ZeroMQ's credentials provider)."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = set(keys)

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self._keys


class CoordinatorPlane:
    """The coordinator's end. ``host``: the address that ranks reach it by; it listens on that address only."""

    def __init__(self, host: str, num_ranks: int) -> None:
        self._context = zmq.Context()
        server_public, server_secret = zmq.curve_keypair()
        pairs = [zmq.curve_keypair() for _ in range(num_ranks)]
        self._auth = zmq.auth.thread.ThreadAuthenticator(self._context)
        self._auth.start()
        self._auth.configure_curve_callback("*", credentials_provider=_KnownKeys([public for public, _ in pairs]))
        self._socket = self._context.socket(zmq.ROUTER)
        # A last command, such as to close, must still get out when the socket closes
        self._socket.linger = 1000
        self._socket.router_mandatory = True
        self._socket.curve_server = True
        self._socket.curve_publickey, self._socket.curve_secretkey = server_public, server_secret
        # A rank that comes back under its name takes the place of its old, perhaps half-open, connection
        self._socket.router_handover = True
        self._socket.ipv6 = ":" in host
        where = f"tcp://[{host}]" if ":" in host else f"tcp://{host}"
        port = self._socket.bind_to_random_port(where)
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Answer)
        self.tickets = [
            PlaneTicket(rank, f"{where}:{port}", server_public.decode(), public.decode(), secret.decode())
            for rank, (public, secret) in enumerate(pairs)
        ]

    def send(self, rank: int, command: Command) -> None:
        """Send to one rank; raise ``ConnectionError`` if it is not connected."""
        try:
            self._socket.send_multipart([_identity(rank), self._encoder.encode(command)])
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
        self._socket.close()
        self._auth.stop()
        self._context.term()


class RankPlane:
    """A rank's end."""

    def __init__(self, ticket: PlaneTicket) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        # What a rank said last, such as why it refused, must still get out when it closes
        self._socket.linger = 1000
        self._socket.setsockopt(zmq.IDENTITY, _identity(ticket.rank))
        self._socket.curve_serverkey = ticket.server_key.encode()
        self._socket.curve_publickey = ticket.public_key.encode()
        self._socket.curve_secretkey = ticket.secret_key.encode()
        self._socket.ipv6 = "[" in ticket.address
        self._socket.connect(ticket.address)
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
        self._socket.close()
        self._context.term()


def _identity(rank: int) -> bytes:
    return str(rank).encode()
