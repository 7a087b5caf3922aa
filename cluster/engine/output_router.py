"""Sort the outputs of a step to the coroutines that wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import replace

from .backend import EngineDeadError
from .output import ERROR, RequestOutput


class OutputRouter:
    """One queue per live request. Delivered twice, tokens are dropped; missing ones are an error.

    Belongs to one event loop; ``deliver`` is called on it.
    """

    def __init__(self) -> None:
        self._queues: dict[str, asyncio.Queue[RequestOutput]] = {}

    def deliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Hand each output to its reader; those of readers who have gone are dropped."""
        for output in outputs:
            reader = self._queues.get(output.request_id)
            if reader is not None:
                reader.put_nowait(output)

    def fail_all(self, message: str) -> None:
        """Give every reader an error: no more outputs will come."""
        for request_id, reader in self._queues.items():
            reader.put_nowait(RequestOutput(request_id, 0, [], finish_reason=ERROR, error=message))

    async def read(
        self, request_id: str, submit: Callable[[], Awaitable[None]], abort: Callable[[], Awaitable[None]]
    ) -> AsyncGenerator[RequestOutput, None]:
        """Submit a request and yield its outputs in order, each token once.

        Raises what ``submit`` raises and ``EngineDeadError``. ``abort`` is called when the reader leaves before the
        request has ended.
        """
        if request_id in self._queues:
            raise ValueError(f"request_id: {request_id!r} is in use")
        reader = self._queues[request_id] = asyncio.Queue()
        submitted = ended = False
        num_received = 0
        try:
            # Before the wait: cancelled in it, the request may have been taken nevertheless
            submitted = True
            await submit()
            while not ended:
                output = await reader.get()
                if output.finish_reason == ERROR:
                    ended = True
                    raise EngineDeadError(output.error or "the engine failed")
                if output.offset > num_received:
                    raise EngineDeadError(f"output tokens {num_received} to {output.offset - 1} were lost")
                known = num_received - output.offset
                fresh = output.token_ids[known:]
                num_received += len(fresh)
                ended = output.finish_reason is not None
                if fresh or ended:
                    logprobs = output.logprobs.cut(known) if output.logprobs is not None else None
                    yield replace(output, offset=num_received - len(fresh), token_ids=fresh, logprobs=logprobs)
        finally:
            del self._queues[request_id]
            if submitted and not ended:
                with suppress(EngineDeadError):  # aborting what was never taken is ignored
                    await abort()
