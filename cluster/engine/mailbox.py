"""Outputs on their way to a reader who may be slower than the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from .output import RequestOutput


class Mailbox:
    """Holds at most one output per request: while nobody takes them, later ones are merged into it.

    So a reader that lags holds up nobody, and what waits for it is bounded by the tokens of its requests. Belongs to
    one event loop.
    """

    def __init__(self) -> None:
        self._outputs: dict[str, RequestOutput] = {}
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._outputs)

    def put(self, outputs: Iterable[RequestOutput]) -> None:
        """Add outputs; those of one request must follow one another without gaps."""
        for output in outputs:
            earlier = self._outputs.get(output.request_id)
            self._outputs[output.request_id] = output if earlier is None else earlier.followed_by(output)
        self.wake()

    def wake(self) -> None:
        """Have ``take`` return, with nothing if there is nothing."""
        self._filled.set()

    async def take(self) -> list[RequestOutput]:
        """Wait for outputs and return them, one per request."""
        await self._filled.wait()
        return self.drain()

    def drain(self) -> list[RequestOutput]:
        """Return the outputs that are there, one per request."""
        self._filled.clear()
        outputs = list(self._outputs.values())
        self._outputs.clear()
        return outputs
