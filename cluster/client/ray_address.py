"""Look at the address of a Ray cluster before Ray does: where no Ray answers, it tries for minutes."""

from __future__ import annotations

import os
import re
import socket

_HOST_PORT = re.compile(r"(?:ray://)?\[?(?P<host>[^/]+?)\]?:(?P<port>\d{1,5})")
_ANSWER_S = 10.0
_SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS
"""How a client of HTTP/2, which gRPC is, begins (RFC 9113, 3.4); a server answers with its own settings frame."""


def checked_address(address: str | None) -> str:
    """Return ``address``, or what it defaults to, for ``ray.init``: HOST:PORT, ray://HOST:PORT or ``auto``.

    None and ``auto`` are the cluster that RAY_ADDRESS names, or the one on this machine. Raises ``ValueError`` for what
    is no address, and ``ConnectionError`` where no Ray answers.
    """
    if address is None or address == "auto":  # as Ray reads the two
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address == "auto":
        return address
    match = _HOST_PORT.fullmatch(address)
    if match is None:
        raise ValueError(
            f"address: {address!r} is not HOST:PORT, ray://HOST:PORT or auto, as for a Ray cluster; "
            "a Penstock server's address is http://HOST:PORT"
        )
    host, port = match["host"], int(match["port"])
    try:
        answers = is_ray(host, port)
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"address: no Ray cluster at {address}: {error}") from error
    if not answers:
        raise ConnectionError(
            f"address: no Ray cluster at {address}: something else listens there; "
            f"a Penstock server's address is http://{host}:{port}"
        )
    return address


def is_ray(host: str, port: int) -> bool:
    """Tell whether what listens there speaks gRPC, as Ray does; raise ``OSError`` where nobody listens."""
    with socket.create_connection((host, port), timeout=_ANSWER_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return True  # no matter what it is: it would have to be spoken to under TLS
        try:
            connection.sendall(_HELLO)
            header = connection.recv(len(_SETTINGS))
        except OSError:
            return False
        return len(header) == len(_SETTINGS) and header[3] == _SETTINGS[3]
