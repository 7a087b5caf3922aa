"""An ingress's tie to one gang: a socket to its coordinator, shared by all requests; Ray tells of its death."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from ...workers.sampling_params import SamplingParams
from ..engine.backend import EngineDeadError, QueueFullError
from ..engine.output import RequestOutput
from ..engine.output_router import OutputRouter
from ..speculation.options import SpeculationOptions
from ..transport.request_client import RequestClient
from .attachments import DRAINING


class GangLink:
    """Attaches to ``coordinator`` while `run` runs. Create it on the event loop that will use it."""

    def __init__(self, coordinator: Any) -> None:
        self.coordinator = coordinator
        self.num_live = 0
        """Requests that were sent here and have not ended."""
        self.open = False
        """It takes requests."""
        self._router = OutputRouter()
        self._client: RequestClient | None = None
        self._ended = asyncio.Event()
        # A new name each time: the coordinator may still be forgetting the last one
        self._reader_id = uuid.uuid4().hex

    async def run(self, on_open: Callable[[], None]) -> None:
        """Be attached until the gang is drained; raise when it is lost, whose requests end with ``EngineDeadError``.

        ``on_open`` is called once it takes requests.
        """
        attachment = self.coordinator.attach.options(num_returns="streaming").remote(self._reader_id)
        client = self._client = RequestClient(await (await anext(attachment)), self._router)
        # Ray tells of the coordinator's death at once, the lease of what Ray does not see
        watches = [asyncio.create_task(self._drained(attachment)), asyncio.create_task(client.run())]
        try:
            await client.connected()
            self.open = True
            on_open()
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            done.pop().result()
        finally:
            self.open = False
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
            client.close()
            self._router.fail_all("the gang that served this request is gone; send it again")
            # Nobody waits for it: the coordinator may be gone
            self.coordinator.detach.remote(self._reader_id)

    async def _drained(self, attachment: Any) -> None:
        """Return when the gang wants to stop and has no requests of ours left; raise when the stream ends."""
        async for item in attachment:
            if await item == DRAINING:  # a death comes as an item
                self.open = False
                while self.num_live:
                    self._ended.clear()
                    await self._ended.wait()
                return
        raise EngineDeadError("the coordinator has forgotten this ingress")

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Count a request as live."""
        self.num_live += 1
        try:
            yield
        finally:
            self.num_live -= 1
            self._ended.set()

    def read(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        speculation: SpeculationOptions,
        client: str,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Send a request and yield its outputs; see ``Backend.generate``."""
        plane = self._client
        assert plane is not None, "it is open"
        return self._router.read(
            request_id,
            lambda: plane.submit(request_id, prompt_token_ids, sampling, speculation, client),
            lambda reason: plane.abort(request_id, reason),
        )

    def stopped(self, request_id: str) -> None:
        """Say that the reader found its stop string."""
        self._router.stopped(request_id)

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
