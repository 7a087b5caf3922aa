from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from penstock.cluster.engine.backend import EngineDeadError, QueueFullError, RequestTimeoutError
from penstock.cluster.engine.output import ABORT, ERROR, LENGTH, STOP, TIMEOUT, RequestOutput
from penstock.cluster.engine.output_router import OutputRouter


class Reading:
    """One request read through a router, and what became of it."""

    def __init__(self, router: OutputRouter, refusal: Exception | None = None) -> None:
        self.aborted: list[str] = []
        self._refusal = refusal
        self.outputs: AsyncGenerator[RequestOutput, None] = router.read("r", self._submit, self._abort)

    def _submit(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    def _abort(self, reason: str) -> None:
        self.aborted.append(reason)

    async def start(self) -> asyncio.Task[RequestOutput]:
        """Begin to read the first output."""
        first = asyncio.ensure_future(anext(self.outputs))
        await asyncio.sleep(0)
        return first


def tokens(offset: int, *ids: int, **fields: object) -> RequestOutput:
    return RequestOutput("r", offset, list(ids), **fields)  # type: ignore[arg-type]


async def test_a_reader_that_keeps_up_gets_every_step() -> None:
    router = OutputRouter()
    reading = Reading(router)
    first = await reading.start()
    router.deliver([tokens(0, 5)])
    assert await first == tokens(0, 5)
    router.deliver([tokens(1, 6, 7, finish_reason=LENGTH)])
    assert await anext(reading.outputs) == tokens(1, 6, 7, finish_reason=LENGTH)
    assert [output async for output in reading.outputs] == []
    assert reading.aborted == []


async def test_a_reader_that_lags_gets_several_steps_in_one() -> None:
    router = OutputRouter()
    reading = Reading(router)
    first = await reading.start()
    router.deliver([tokens(0, 0)])
    await first
    for i in range(1, 1000):
        router.deliver([tokens(i, i), tokens(i, i)])
    router.deliver([tokens(998, 998, 999, 1000, finish_reason=LENGTH)])
    merged = await anext(reading.outputs)
    assert merged == tokens(1, *range(1, 1001), finish_reason=LENGTH, num_steps=1000)
    assert [output async for output in reading.outputs] == []


@pytest.mark.parametrize(("reason", "expected"), [(TIMEOUT, RequestTimeoutError), (ERROR, EngineDeadError)])
async def test_what_came_before_an_error_is_read_first(reason: str, expected: type[Exception]) -> None:
    router = OutputRouter()
    reading = Reading(router)
    first = await reading.start()
    router.deliver([tokens(0, 1), tokens(1, 2), tokens(2, finish_reason=reason, error="too bad")])
    assert (await first).token_ids == [1, 2]
    with pytest.raises(expected, match="too bad"):
        await anext(reading.outputs)
    assert reading.aborted == [], "the engine has ended it"


async def test_lost_tokens_end_the_request_with_an_error() -> None:
    router = OutputRouter()
    reading = Reading(router)
    first = await reading.start()
    router.deliver([tokens(0, 1), tokens(3, 4), tokens(4, 5)])
    assert (await first).token_ids == [1]
    with pytest.raises(EngineDeadError, match="output tokens 1 to 2 were lost"):
        await anext(reading.outputs)
    assert reading.aborted == [ABORT]


async def test_all_readers_learn_that_no_more_will_come() -> None:
    router = OutputRouter()
    reading = Reading(router)
    first = await reading.start()
    router.deliver([tokens(0, 1)])
    router.fail_all("gone")
    router.deliver([tokens(1, 2)])
    assert (await first).token_ids == [1]
    with pytest.raises(EngineDeadError, match="gone"):
        await anext(reading.outputs)


@pytest.mark.parametrize("reason", [ABORT, STOP])
async def test_leaving_aborts_and_says_why(reason: str) -> None:
    router = OutputRouter()
    reading = Reading(router)
    first = await reading.start()
    router.deliver([tokens(0, 1)])
    await first
    if reason == STOP:
        router.stopped("r")
    await reading.outputs.aclose()
    assert reading.aborted == [reason]
    router.deliver([tokens(1, 2)])  # nobody minds
    router.stopped("r")


async def test_what_was_refused_is_not_aborted() -> None:
    router = OutputRouter()
    at_once = Reading(router, QueueFullError("full", 1.0))
    with pytest.raises(QueueFullError):
        await anext(at_once.outputs)
    assert at_once.aborted == []

    later = Reading(router)
    first = await later.start()
    router.refuse("r", QueueFullError("full", 1.0))
    with pytest.raises(QueueFullError):
        await first
    assert later.aborted == []
    router.refuse("r", QueueFullError("full", 1.0))  # nobody minds
