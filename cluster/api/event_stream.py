"""Answering a client that may go away: work stops, and what it held is closed, as soon as it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

# Plain tasks, not cancel scopes: closing a backend's iterator may have to await, which a cancelled scope forbids.


async def while_connected(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Return what ``work`` returns; cancel it and raise ``ClientDisconnect`` if the client goes away first.

    The request's body must have been read.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        gone = not working.done()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
    if gone:
        raise ClientDisconnect
    return working.result()


class EventStream(Response):
    """Server-sent events, one per string of ``events``; it and then ``held`` are closed when the answer ends."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[str, None], held: AsyncExitStack, headers: dict[str, str] | None = None
    ) -> None:
        # without the last, proxies may gather events before passing them on
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._events, self._held = events, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; the first of them to fail ends the answer."""
        try:
            await while_connected(self._send_all(send), receive)
        except (ClientDisconnect, OSError):
            pass
        finally:
            # a generator that was never started closes nothing itself
            async with self._held:
                await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            body = f"data: {event}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
