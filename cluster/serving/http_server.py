"""HTTP from the ingress itself: a stream through Serve's proxy costs an actor call and several times the CPU."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

_RETRY_S = 0.2
_BIND_S = 30.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen."""

    host: str
    port: int


async def listen(app: FastAPI, address: Address) -> asyncio.Task[None]:
    """Serve ``app`` on the running event loop; return once it accepts connections.

    Waits for a predecessor that still holds the port; raises ``OSError`` if it does so for long.
    """
    listener = await _bind(address)
    # a restart must not wait for streams to end: whoever ends us has decided
    settings = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(settings)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    return serving


async def _bind(address: Address) -> socket.socket:
    deadline = time.monotonic() + _BIND_S
    while True:
        listener = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address.host, address.port))
        except OSError:
            listener.close()
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(_RETRY_S)
        else:
            return listener
