"""Sockets under CURVE: only keys that the listening side made and handed out may connect, and all is encrypted."""

from __future__ import annotations

from dataclasses import dataclass

import zmq
import zmq.auth.thread

LOOPBACK = "127.0.0.1"
_LINGER_MS = 1000
"""What was said last, such as to close or why one refused, must still get out when its socket closes."""


_GONE_S = 60
"""A peer whose machine has not answered for so long is gone without a word; deadlines have given it up long before."""


def _notice_silence(socket: zmq.Socket[bytes]) -> None:
    """Have the kernel close connections to machines that do not answer; a stopped process' machine does."""
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle = socket.tcp_keepalive_intvl = _GONE_S // 6
    socket.tcp_keepalive_cnt = 5
    socket.tcp_maxrt = 1000 * _GONE_S


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a peer needs to connect; it holds a secret key, so it travels over trusted channels only."""

    identity: str
    """The name that the listening side knows the peer by."""
    address: str
    server_key: str
    public_key: str
    secret_key: str


class CurveRouter:
    """A listening ROUTER socket. ``host``: the address that peers reach it by; it listens on that address only."""

    def __init__(self, host: str) -> None:
        self._context = zmq.Context()
        public, secret = zmq.curve_keypair()
        self._server_key = public.decode()
        self._admitted: set[bytes] = set()
        self._auth = zmq.auth.thread.ThreadAuthenticator(self._context)
        self._auth.start()
        self._auth.configure_curve_callback("*", credentials_provider=self)
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.linger = _LINGER_MS
        _notice_silence(self.socket)
        self.socket.router_mandatory = True
        self.socket.curve_server = True
        self.socket.curve_publickey, self.socket.curve_secretkey = public, secret
        # A peer that comes back under its name takes the place of its old, perhaps half-open, connection
        self.socket.router_handover = True
        self.socket.ipv6 = ":" in host
        where = f"tcp://[{host}]" if ":" in host else f"tcp://{host}"
        self._address = f"{where}:{self.socket.bind_to_random_port(where)}"

    def callback(self, domain: str, key: bytes) -> bool:
        """Tell ZeroMQ whether to admit a key (its name for it: a credentials provider)."""
        return key in self._admitted

    def issue(self, identity: str) -> Ticket:
        """Make a key for a peer and admit it."""
        public, secret = zmq.curve_keypair()
        self._admitted.add(public)
        return Ticket(identity, self._address, self._server_key, public.decode(), secret.decode())

    def revoke(self, ticket: Ticket) -> None:
        """Admit a ticket no more; a connection that stands is left alone."""
        self._admitted.discard(ticket.public_key.encode())

    def close(self) -> None:
        """Close the socket and its authenticator."""
        self.socket.close()
        self._auth.stop()
        self._context.term()


class CurveDealer:
    """A DEALER socket that connects with a ticket."""

    def __init__(self, ticket: Ticket) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = _LINGER_MS
        _notice_silence(self.socket)
        self.socket.setsockopt(zmq.IDENTITY, ticket.identity.encode())
        self.socket.curve_serverkey = ticket.server_key.encode()
        self.socket.curve_publickey = ticket.public_key.encode()
        self.socket.curve_secretkey = ticket.secret_key.encode()
        self.socket.ipv6 = "[" in ticket.address
        self.socket.connect(ticket.address)

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()
        self._context.term()
