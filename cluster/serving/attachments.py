"""Who is attached to a coordinator, and how a gang that is to stop gets rid of them without losing a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from ..engine.backend import EngineDeadError
from ..transport.curve import Ticket
from ..transport.request_server import RequestServer

DRAINING = "draining"
"""Told to every reader once: send no more requests, and detach when those that you sent have ended."""


class Attachments:
    """The readers of ``requests``. Belongs to the running event loop.

    A reader that has detached can send nothing any more, so when all have, every request has ended: no request is
    refused for having been on its way while the gang was told to stop.
    """

    def __init__(self, requests: RequestServer) -> None:
        self._requests = requests
        self._reader_ids: set[str] = set()
        self._draining = asyncio.Event()

    async def attach(self, reader_id: str) -> AsyncIterator[Ticket | str]:
        """Yield what ``reader_id`` connects with, then `DRAINING` if it comes to that; end when it is forgotten."""
        if self._draining.is_set():
            raise EngineDeadError("the gang is draining")
        self._reader_ids.add(reader_id)
        try:
            yield self._requests.attach(reader_id)
            gone = asyncio.create_task(self._requests.detached(reader_id))
            draining = asyncio.create_task(self._draining.wait())
            try:
                await asyncio.wait({gone, draining}, return_when=asyncio.FIRST_COMPLETED)
                if not gone.done():
                    yield DRAINING
                    await gone
            finally:
                gone.cancel()
                draining.cancel()
        finally:
            self.detach(reader_id)

    def detach(self, reader_id: str) -> None:
        """Forget a reader and abort its requests; an unknown one is ignored."""
        self._reader_ids.discard(reader_id)
        self._requests.detach(reader_id)

    async def drain(self) -> None:
        """Admit no reader any more; return when those that there are have detached, or have been found dead."""
        self._draining.set()
        for reader_id in list(self._reader_ids):
            await self._requests.detached(reader_id)
