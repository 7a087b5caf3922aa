"""Requests that outlive their coordinators: sent to the next with what they have, every token delivered once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace

import pytest

from penstock.cluster.engine.backend import EngineDeadError, QueueFullError
from penstock.cluster.engine.output import ABORT, ERROR, LENGTH, RequestOutput
from penstock.cluster.engine.output_router import OutputRouter
from penstock.cluster.transport.live_requests import Destination, LiveRequests
from penstock.cluster.transport.request_client import RequestClient

from .test_request_plane import DRAFTED, LEASE_S, SAMPLING, Plane, until


class Ingress:
    """Readers of requests, and the coordinator that they are attached to at present."""

    def __init__(self, timeout_s: float = 60.0) -> None:
        self.router = OutputRouter()
        self.live = LiveRequests(self.router, timeout_s)
        self.destination: Destination | None = None
        self.client: RequestClient | None = None
        self.running: asyncio.Future[None] | None = None
        self.reasons: list[str] = []
        self.tasks: set[asyncio.Task[None]] = set()

    def lose(self, why: str) -> None:
        self.reasons.append(why)

    async def attach(self, plane: Plane) -> int:
        self.destination = self.live.destination(self.lose)
        self.client = RequestClient(plane.server.attach(f"reader-{id(plane)}"), self.destination, lease_s=LEASE_S)
        await self.client.connected()
        return self.destination.attached(self.client)

    def detach(self) -> None:
        assert self.client is not None
        self.client.close()
        assert self.destination is not None
        self.destination.detached()

    def read(self, request_id: str = "r", sampling=SAMPLING) -> tuple[list[int], asyncio.Task[None]]:
        got: list[int] = []

        async def run() -> None:
            outputs = self.router.read(
                request_id,
                lambda: self.live.submit(request_id, [5, 6], sampling, DRAFTED),
                lambda reason: self.live.abort(request_id, reason),
            )
            async for output in outputs:
                assert output.request_id == request_id
                assert output.offset == len(got)
                got.extend(output.token_ids)

        task = asyncio.create_task(run())
        self.tasks.add(task)
        return got, task


@pytest.fixture
async def planes() -> AsyncIterator[list[Plane]]:
    planes = [Plane(), Plane()]
    yield planes
    for plane in planes:
        plane.server.close()


@pytest.fixture
async def ingress() -> AsyncIterator[Ingress]:
    ingress = Ingress()
    yield ingress
    if ingress.client is not None:
        ingress.client.close()
    for task in ingress.tasks:
        task.cancel()
        with suppress(asyncio.CancelledError, EngineDeadError, QueueFullError, ValueError):
            await task


async def test_a_request_goes_on_at_the_next_coordinator_each_token_once(ingress: Ingress, planes: list[Plane]) -> None:
    first, second = planes
    assert await ingress.attach(first) == 0
    got, task = ingress.read(sampling=replace(SAMPLING, seed=None))
    await until(lambda: first.sink.submitted)
    name, prompt, sampling, speculation = first.sink.submitted[0]
    assert (prompt, speculation) == ([5, 6], DRAFTED)
    assert sampling.seed is not None, "drawn here, so that the next coordinator draws the same tokens"
    first.server.deliver([RequestOutput(name, 0, [1, 2])])
    await until(lambda: got == [1, 2])
    ingress.detach()
    assert not task.done()
    assert await ingress.attach(second) == 1
    await until(lambda: second.sink.submitted)
    again, prompt, sampling_again, _ = second.sink.submitted[0]
    assert (prompt, sampling_again) == ([5, 6], sampling)
    assert second.sink.resumed == [([1, 2], True)]
    assert first.sink.resumed == [([], False)]
    assert again != name, "what answers the first submission answers no other"
    second.server.deliver([RequestOutput(again, 2, [3]), RequestOutput(again, 3, [4], LENGTH)])
    await task
    assert got == [1, 2, 3, 4]
    ingress.detach()
    first.server.detach(f"reader-{id(first)}")
    assert await ingress.attach(first) == 0, "what has ended is sent no more"


async def test_what_comes_between_two_coordinators_waits_for_the_next(ingress: Ingress, planes: list[Plane]) -> None:
    got, task = ingress.read()
    await asyncio.sleep(0)
    assert await ingress.attach(planes[0]) == 0
    await until(lambda: planes[0].sink.submitted)
    assert planes[0].sink.resumed == [([], False)], "the queue may be full for it"
    planes[0].server.deliver([RequestOutput(planes[0].sink.submitted[0][0], 0, [1], LENGTH)])
    await task
    assert got == [1]


async def test_an_engine_that_dies_is_a_loss_and_not_an_answer(ingress: Ingress, planes: list[Plane]) -> None:
    first, second = planes
    await ingress.attach(first)
    got, task = ingress.read()
    await until(lambda: first.sink.submitted)
    name = first.sink.submitted[0][0]
    first.server.deliver([RequestOutput(name, 0, [1]), RequestOutput(name, 1, [2], ERROR, error="the engine failed")])
    await until(lambda: ingress.reasons)
    assert ingress.reasons == ["the engine failed"]
    await until(lambda: got == [1, 2])
    ingress.detach()
    await ingress.attach(second)
    await until(lambda: second.sink.submitted)
    second.server.deliver([RequestOutput(second.sink.submitted[0][0], 2, [3], LENGTH)])
    await task
    assert got == [1, 2, 3]


async def test_a_dead_engine_that_refuses_keeps_the_request_waiting(ingress: Ingress, planes: list[Plane]) -> None:
    await ingress.attach(planes[0])
    planes[0].sink.refusal = EngineDeadError("rank 0 died")
    _, task = ingress.read()
    await until(lambda: ingress.reasons)
    ingress.detach()
    await ingress.attach(planes[1])
    await until(lambda: planes[1].sink.submitted)
    assert not task.done()


@pytest.mark.parametrize("refusal", [ValueError("prompt: no"), QueueFullError("64 requests wait", 7.5)])
async def test_a_refusal_reaches_the_reader(ingress: Ingress, planes: list[Plane], refusal: Exception) -> None:
    await ingress.attach(planes[0])
    planes[0].sink.refusal = refusal
    _, task = ingress.read()
    with pytest.raises(type(refusal)):
        await task
    planes[0].sink.refusal = None
    ingress.detach()
    await ingress.attach(planes[1])
    assert planes[1].sink.submitted == []


async def test_a_reader_that_leaves_aborts_what_the_coordinator_has(ingress: Ingress, planes: list[Plane]) -> None:
    first, second = planes
    await ingress.attach(first)
    _, task = ingress.read()
    await until(lambda: first.sink.submitted)
    ingress.detach()
    await ingress.attach(second)
    await until(lambda: second.sink.submitted)
    task.cancel()
    await until(lambda: second.sink.aborted)
    assert second.sink.aborted == [(second.sink.submitted[0][0], ABORT)]


async def test_a_request_that_coordinators_die_under_is_given_up(ingress: Ingress, planes: list[Plane]) -> None:
    _, task = ingress.read()
    await asyncio.sleep(0)
    for number in range(4):
        assert not task.done()
        plane = planes[number % 2]
        plane.server.detach(f"reader-{id(plane)}")
        await ingress.attach(plane)
        await until(lambda number=number, plane=plane: len(plane.sink.submitted) == number // 2 + 1)
        ingress.detach()
    with pytest.raises(EngineDeadError, match="was lost 4 times; send it again"):
        await task


async def test_patience_ends(planes: list[Plane]) -> None:
    ingress = Ingress(timeout_s=0.2)
    _, waiting = ingress.read()
    with pytest.raises(EngineDeadError, match="send it again"):
        await waiting
    _, refused = ingress.read()
    with pytest.raises(EngineDeadError, match="no gang is serving"):
        await refused
    await ingress.attach(planes[0])
    ingress.read()
    await until(lambda: planes[0].sink.submitted)
    assert ingress.client is not None
    ingress.client.close()


async def test_what_a_gang_has_that_is_lost_after_patience_ended_does_not_wait_for_ever(planes: list[Plane]) -> None:
    ingress = Ingress(timeout_s=0.2)
    await ingress.attach(planes[0])
    _, task = ingress.read()
    await until(lambda: planes[0].sink.submitted)
    assert ingress.destination is not None
    ingress.destination.drain()
    await until(lambda: ingress.live._has_given_up)
    assert not task.done(), "the gang has it yet"
    ingress.detach()
    with pytest.raises(EngineDeadError, match="send it again"):
        await asyncio.wait_for(task, 5)
