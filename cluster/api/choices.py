"""Several streams as one: the choices of one HTTP request, each a request of the engine's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yield (index, item) of all ``streams`` as items come.

    The first stream to fail ends all, with its error. Closing the generator closes every stream.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for only_item in only:
                yield 0, only_item
        return
    # None: a stream has ended. Bounded: streams wait for a slow reader, and merge what they get meanwhile
    arrived: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(len(streams))

    async def pump(index: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await arrived.put((index, item))
            await arrived.put(None)
        except Exception as error:
            await arrived.put(error)

    pumps = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_open = len(streams)
        while num_open:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
