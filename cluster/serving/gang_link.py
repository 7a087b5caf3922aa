"""An ingress's tie to one gang: a socket to its coordinator, shared by all requests; Ray tells of its death."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from ..engine.backend import EngineDeadError, QueueFullError
from ..transport.live_requests import LiveRequests
from ..transport.request_client import RequestClient
from .attachments import DRAINING


class GangLink:
    """Attaches to ``coordinator`` while `run` runs, as a destination of ``requests``.

    Create it on the event loop that will use it.
    """

    def __init__(self, coordinator: Any, requests: LiveRequests) -> None:
        self.coordinator = coordinator
        self._destination = requests.destination(self._lose)
        self._client: RequestClient | None = None
        # A new name each time: the coordinator may still be forgetting the last one
        self._reader_id = uuid.uuid4().hex

    async def run(self, on_open: Callable[[int], None], on_lost: Callable[[int], None]) -> None:
        """Be attached until the gang is drained; raise when it is lost.

        ``on_open`` is called once it takes requests, with how many it got that another coordinator had; ``on_lost``
        when it is lost, with how many of its requests another one has got.
        """
        attachment = self.coordinator.attach.options(num_returns="streaming").remote(self._reader_id)
        client = self._client = RequestClient(await (await anext(attachment)), self._destination)
        # Ray tells of the coordinator's death at once, the lease of what Ray does not see
        watches = [asyncio.create_task(self._drained(attachment)), asyncio.create_task(client.run())]
        opened = False
        try:
            await client.connected()
            opened = True
            on_open(self._destination.attached(client))
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            done.pop().result()
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
            client.close()
            num_moved = self._destination.detached()
            # Nobody waits for it: the coordinator may be gone
            self.coordinator.detach.remote(self._reader_id)
            if opened:
                on_lost(num_moved)

    def _lose(self, why: str) -> None:
        if self._client is not None:
            self._client.lose(why)

    async def _drained(self, attachment: Any) -> None:
        """Return when the gang wants to stop and has no requests of ours left; raise when the stream ends."""
        async for item in attachment:
            if await item == DRAINING:  # a death comes as an item
                self._destination.drain()
                await self._destination.emptied()
                return
        raise EngineDeadError("the coordinator has forgotten this ingress")

    async def call(self, method: str) -> Any:
        """Call the coordinator and raise its own errors instead of Ray's wrappings."""
        try:
            return await getattr(self.coordinator, method).remote()
        except RayTaskError as error:
            if isinstance(error.cause, ValueError | EngineDeadError | QueueFullError):
                raise error.cause from None
            raise
        except RayActorError as error:
            raise EngineDeadError("the coordinator is gone; send the request again") from error
