"""One ingress and several gangs on one event loop, over real sockets; engines are scripted, Ray is played."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from typing import Any

import pytest

from penstock.cluster.engine.backend import EngineDeadError
from penstock.cluster.engine.events import RESUBMISSION, Event
from penstock.cluster.engine.output import ABORT, LENGTH, STOP, RequestOutput
from penstock.cluster.serving.attachments import Attachments
from penstock.cluster.serving.gang_backend import GangBackend
from penstock.cluster.transport.curve import LOOPBACK
from penstock.cluster.transport.request_server import RequestServer

from .test_request_plane import SAMPLING, Sink, until

TIMEOUT_S = 1.0


class Gang:
    """A coordinator without an engine."""

    def __init__(self) -> None:
        self.sink = Sink()
        self.server = RequestServer(LOOPBACK, self.sink)
        self.attachments: Attachments | None = Attachments(self.server)
        self.died = asyncio.get_running_loop().create_future()
        self.unknown_fields = 0
        self.healthy = True
        self.events: list[Event] = []

    async def attach(self, reader_id: str) -> AsyncIterator[Any]:
        if self.attachments is None:
            raise EngineDeadError("the engine has not loaded yet")
        async for item in self.attachments.attach(reader_id):
            yield item

    async def detach(self, reader_id: str) -> None:
        self.attachments.detach(reader_id)

    async def count_unknown_fields(self, endpoint: str, num_fields: int) -> None:
        self.unknown_fields += num_fields

    async def check_health(self) -> None:
        if not self.healthy:
            raise EngineDeadError("a worker is gone")

    async def record(self, event: Event) -> None:
        self.events.append(event)

    @property
    def request_ids(self) -> list[str]:
        return [name.partition("~")[0] for name, *_ in self.sink.submitted]

    @property
    def aborted(self) -> list[tuple[str, str]]:
        return [(name.partition("~")[0], reason) for name, reason in self.sink.aborted]

    def end(self, *request_ids: str) -> None:
        names = [name for name, *_ in self.sink.submitted if name.partition("~")[0] in request_ids]
        self.server.deliver([RequestOutput(name, 0, [1, 2], LENGTH) for name in names])


class Handle:
    """Plays Ray's handle of an actor: streams run on whether they are read or not, and end with an actor's death."""

    def __init__(self, gang: Gang) -> None:
        self._gang = gang

    def __getattr__(self, method: str) -> Handle._Method:
        return Handle._Method(self._gang, getattr(self._gang, method))

    class _Method:
        def __init__(self, gang: Gang, function: Any) -> None:
            self._gang, self._function = gang, function

        def options(self, *, num_returns: str) -> Handle._Method:
            assert num_returns == "streaming"
            return self

        def remote(self, *args: Any) -> Any:
            made = self._function(*args)
            return self._stream(made) if inspect.isasyncgen(made) else asyncio.ensure_future(made)

        async def _stream(self, made: AsyncIterator[Any]) -> AsyncIterator[Awaitable[Any]]:
            items: asyncio.Queue[Awaitable[Any]] = asyncio.Queue()
            self._gang.died.add_done_callback(items.put_nowait)

            async def run() -> None:
                try:
                    async for item in made:
                        items.put_nowait(asyncio.sleep(0, item))
                except EngineDeadError as error:
                    failed = asyncio.get_running_loop().create_future()
                    failed.set_exception(error)
                    items.put_nowait(failed)

            self._gang.stream = asyncio.ensure_future(run())
            while True:
                yield await items.get()


class Gangs:
    """What there is, by name, and the backend over it."""

    def __init__(self) -> None:
        self.there: dict[str, Gang] = {}
        self.backend = GangBackend(self._find, TIMEOUT_S)
        self.reading: list[asyncio.Task[Any]] = []

    async def _find(self) -> dict[str, Handle]:
        return {name: Handle(gang) for name, gang in self.there.items()}

    async def add(self, *names: str) -> list[Gang]:
        for name in names:
            self.there[name] = Gang()
        await until(lambda: len(self.backend._open) == len(self.there))
        return [self.there[name] for name in names]

    async def ask(self, *request_ids: str) -> list[asyncio.Task[list[RequestOutput]]]:
        """Send requests, one after another, and wait until a gang has them."""
        tasks = []
        for request_id in request_ids:
            tasks.append(asyncio.ensure_future(self._read(request_id)))
            await until(lambda: any(request_id in gang.request_ids for gang in self.there.values()))  # noqa: B023
        self.reading += tasks
        return tasks

    async def _read(self, request_id: str) -> list[RequestOutput]:
        return [output async for output in self.backend.generate(request_id, [5, 6], SAMPLING)]


@pytest.fixture
async def gangs() -> AsyncIterator[Gangs]:
    gangs = Gangs()
    yield gangs
    for task in gangs.reading:
        task.cancel()
    await asyncio.gather(*gangs.reading, return_exceptions=True)
    await gangs.backend.close()
    for gang in gangs.there.values():
        gang.server.close()


async def test_a_request_goes_to_the_gang_with_the_shortest_queue(gangs: Gangs) -> None:
    one, two = await gangs.add("one", "two")
    await gangs.ask("a", "b", "c", "d")
    assert (len(one.request_ids), len(two.request_ids)) == (2, 2)
    ended = one.request_ids
    one.end(*ended)
    await until(lambda: len(gangs.backend._live._live) == 2)
    await gangs.ask("e", "f")
    assert len(one.request_ids) == 4
    # With equal queues they take turns, also where requests end before the next one comes
    for request_id in ("g", "h", "i", "j"):
        await gangs.ask(request_id)
        for gang in (one, two):
            gang.end(*gang.request_ids)
        await until(lambda: not gangs.backend._live._live)
    assert (len(one.request_ids), len(two.request_ids)) == (6, 4)


async def test_a_gang_that_drains_ends_its_requests_and_gets_no_more(gangs: Gangs) -> None:
    one, two = await gangs.add("one", "two")
    a, b = await gangs.ask("a", "b")
    mine, others = (a, b) if one.request_ids == ["a"] else (b, a)
    drained = asyncio.ensure_future(one.attachments.drain())
    await until(lambda: len(gangs.backend._live.open) == 1)
    await gangs.ask("c", "d")
    assert len(one.request_ids) == 1
    assert len(two.request_ids) == 3
    assert not drained.done()
    one.end(*one.request_ids)
    assert [output.token_ids for output in await mine] == [[1, 2]]
    await asyncio.wait_for(drained, 20)
    assert one.aborted == []
    # It refuses whoever still comes
    with pytest.raises(EngineDeadError, match="draining"):
        await anext(one.attach("late"))
    assert not others.done()


async def test_draining_waits_for_nobody_where_nobody_is_attached(gangs: Gangs) -> None:
    alone = Gang()
    await asyncio.wait_for(alone.attachments.drain(), 20)
    alone.server.close()


async def test_requests_of_a_gang_that_dies_go_on_at_another(gangs: Gangs) -> None:
    one, two = await gangs.add("one", "two")
    tasks = dict(zip("ab", await gangs.ask("a", "b"), strict=True))
    (lost,), (kept,) = one.request_ids, two.request_ids
    one.died.set_exception(RuntimeError("the actor died"))
    del gangs.there["one"]
    await until(lambda: len(two.request_ids) == 2)
    assert two.request_ids == [kept, lost]
    await until(lambda: two.events)
    assert [(event.what, event.num_requests_replayed) for event in two.events] == [(RESUBMISSION, 1)]
    two.end(kept, lost)
    for request_id in "ab":
        assert [output.token_ids for output in await tasks[request_id]] == [[1, 2]]
    one.server.close()


async def test_requests_of_the_only_gang_wait_for_the_next_for_so_long(gangs: Gangs) -> None:
    (one,) = await gangs.add("one")
    first, second = await gangs.ask("a", "b")
    one.died.set_exception(RuntimeError("the actor died"))
    del gangs.there["one"]
    await until(lambda: not gangs.backend._open)
    (two,) = await gangs.add("two")
    await until(lambda: sorted(two.request_ids) == ["a", "b"])
    two.end("a")
    assert [output.token_ids for output in await first] == [[1, 2]]
    two.died.set_exception(RuntimeError("the actor died"))
    del gangs.there["two"]
    with pytest.raises(EngineDeadError, match="send it again"):
        await asyncio.wait_for(second, 20 * TIMEOUT_S)
    for gang in (one, two):
        gang.server.close()


async def test_a_gang_that_loads_is_asked_until_it_has(gangs: Gangs) -> None:
    (one,) = await gangs.add("one")
    loading = Gang()
    attachments, loading.attachments = loading.attachments, None
    gangs.there["two"] = loading
    await gangs.ask("a")
    await until(lambda: hasattr(loading, "stream") and loading.stream.done())
    assert loading.request_ids == []
    loading.attachments = attachments
    await until(lambda: len(gangs.backend._open) == 2)
    await gangs.ask("b")
    assert (one.request_ids, loading.request_ids) == (["a"], ["b"])


async def test_without_a_gang_requests_and_health_say_so(gangs: Gangs) -> None:
    for asked in (gangs.backend.check_health(), gangs.backend.ranks()):
        with pytest.raises(EngineDeadError, match="no gang is serving"):
            await asked
    with pytest.raises(EngineDeadError, match="send it again"):
        await gangs._read("waits for one")
    with pytest.raises(EngineDeadError, match="no gang is serving"):
        await gangs._read("waits no more")


async def test_one_gang_that_can_serve_is_health_enough(gangs: Gangs) -> None:
    one, two = await gangs.add("one", "two")
    one.healthy = False
    await gangs.backend.check_health()
    two.healthy = False
    with pytest.raises(EngineDeadError, match="a worker is gone"):
        await gangs.backend.check_health()
    gangs.backend.count_unknown_fields("/v1/completions", 3)
    await until(lambda: one.unknown_fields + two.unknown_fields == 3)


async def test_what_a_reader_has_found_reaches_the_gang_of_its_request(gangs: Gangs) -> None:
    one, two = await gangs.add("one", "two")
    a, b = await gangs.ask("a", "b")
    gangs.backend.stopped("a")
    a.cancel()
    b.cancel()
    await until(lambda: one.sink.aborted and two.sink.aborted)
    assert sorted(one.aborted + two.aborted) == [("a", STOP), ("b", ABORT)]


async def test_an_id_in_use_is_refused_whichever_gang_has_it(gangs: Gangs) -> None:
    await gangs.add("one", "two")
    await gangs.ask("a")
    with pytest.raises(ValueError, match=r"^request_id: 'a' is in use"):
        await gangs._read("a")


async def test_an_ingress_that_leaves_ends_its_requests_everywhere_at_once(gangs: Gangs) -> None:
    one, two = await gangs.add("one", "two")
    tasks = await gangs.ask("a", "b")
    await gangs.backend.close()
    for task in tasks:
        with pytest.raises(EngineDeadError):
            await task
    await until(lambda: one.sink.aborted and two.sink.aborted)
    # long before a lease would have ended
    for gang in (one, two):
        with suppress(EngineDeadError):
            await asyncio.wait_for(gang.attachments.drain(), 5)
