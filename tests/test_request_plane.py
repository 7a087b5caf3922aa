"""Both ends of the request plane on one event loop, over real sockets; the engine is scripted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

import msgspec
import pytest
import zmq

from penstock.cluster.engine.backend import EngineDeadError, QueueFullError
from penstock.cluster.engine.output import ABORT, LENGTH, STOP, RequestOutput
from penstock.cluster.engine.output_router import OutputRouter
from penstock.cluster.speculation.options import AUTO, SpeculationOptions
from penstock.cluster.transport.curve import LOOPBACK, CurveDealer, Ticket
from penstock.cluster.transport.request_client import RequestClient
from penstock.cluster.transport.request_messages import Abort, ReaderLetter, Renew, Submit
from penstock.cluster.transport.request_server import WINDOW, RequestServer
from penstock.workers.plan import Logprobs
from penstock.workers.sampling_params import SamplingParams

LEASE_S = 1.5
DRAFTED = SpeculationOptions(mode="fixed", max_draft_len=2, prediction_token_ids=(5, 6, 7))
SAMPLING = SamplingParams(
    temperature=0.5, seed=2**62, stop=("x", "y"), stop_token_ids=(4,), logit_bias={3: 2.0, 7: -1.5}, logprobs=2
)


@dataclass
class Sink:
    """The engine: remembers what it was told."""

    submitted: list[tuple[str, list[int], SamplingParams, SpeculationOptions]] = field(default_factory=list)
    clients: list[str] = field(default_factory=list)
    aborted: list[tuple[str, str]] = field(default_factory=list)
    resumed: list[tuple[list[int], bool]] = field(default_factory=list)
    """Of each request submitted: its output before, and whether it had been taken."""
    refusal: Exception | None = None

    def submit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        speculation: SpeculationOptions,
        client: str,
        *,
        output_token_ids: Sequence[int] = (),
        age_s: float = 0.0,
        was_taken: bool = False,
    ) -> None:
        assert 0 <= age_s < 60
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append((request_id, list(prompt_token_ids), sampling, speculation))
        self.clients.append(client)
        self.resumed.append((list(output_token_ids), was_taken))

    def abort(self, request_id: str, reason: str = ABORT) -> None:
        self.aborted.append((request_id, reason))


class Plane:
    """A server and what its engine was told."""

    def __init__(self) -> None:
        self.sink = Sink()
        self.server = RequestServer(LOOPBACK, self.sink, lease_s=LEASE_S)

    @asynccontextmanager
    async def reader(self, name: str = "reader", ticket: Ticket | None = None) -> AsyncIterator[Reader]:
        reader = Reader(ticket or self.server.attach(name))
        try:
            await reader.client.connected()
            yield reader
        finally:
            reader.end()


class Reader:
    """One client with its router."""

    def __init__(self, ticket: Ticket) -> None:
        self.router = OutputRouter()
        self.client = RequestClient(ticket, self.router, lease_s=LEASE_S)
        self.running = asyncio.ensure_future(self.client.run())

    def ask(
        self, request_id: str, prompt: Sequence[int] = (5, 6), client: str = ""
    ) -> AsyncGenerator[RequestOutput, None]:
        return self.router.read(
            request_id,
            lambda: self.client.submit(request_id, prompt, SAMPLING, DRAFTED, client),
            lambda reason: self.client.abort(request_id, reason),
        )

    def end(self) -> None:
        self.running.cancel()
        self.client.close()


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    plane = Plane()
    yield plane
    plane.server.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


async def test_requests_and_outputs_arrive_as_they_were_sent(plane: Plane) -> None:
    async with plane.reader() as reader:
        outputs = reader.ask("a", range(1000), "somebody")
        first = asyncio.ensure_future(anext(outputs))
        await until(lambda: plane.sink.submitted)
        assert plane.sink.submitted == [("a", list(range(1000)), SAMPLING, DRAFTED)]
        assert plane.sink.clients == ["somebody"]
        scored = Logprobs([[5, 6], [7, 8]], [[-0.1, float("-inf")], [-3.0, -4.0]], [1, 2])
        one = RequestOutput("a", 0, [5, 7], logprobs=scored, num_steps=2)
        plane.server.deliver([one, RequestOutput("of nobody", 0, [1])])
        assert await first == one
        last = RequestOutput("a", 2, [9], LENGTH)
        plane.server.deliver([last])
        assert [output async for output in outputs] == [last]
    assert plane.sink.aborted == []


@pytest.mark.parametrize(
    "refusal",
    [ValueError("prompt: no"), QueueFullError("64 requests wait", 7.5), EngineDeadError("rank 0 died")],
)
async def test_a_refusal_is_raised_as_it_was(plane: Plane, refusal: Exception) -> None:
    async with plane.reader() as reader:
        plane.sink.refusal = refusal
        with pytest.raises(type(refusal)) as raised:
            await anext(reader.ask("a"))
        assert raised.value.args == refusal.args
        plane.sink.refusal = None
        taken = asyncio.ensure_future(anext(reader.ask("a")))
        await until(lambda: plane.sink.submitted)
        plane.server.deliver([RequestOutput("a", 0, [1], LENGTH)])
        assert (await taken).token_ids == [1]
    assert plane.sink.aborted == []


async def test_an_id_that_is_in_use_is_refused(plane: Plane) -> None:
    async with plane.reader("one") as one, plane.reader("two") as two:
        taken = asyncio.ensure_future(anext(one.ask("a")))
        await until(lambda: plane.sink.submitted)
        with pytest.raises(ValueError, match="request_id: 'a' is in use"):
            await anext(two.ask("a"))
        plane.server.deliver([RequestOutput("a", 0, [1])])
        assert (await taken).token_ids == [1]


@pytest.mark.parametrize("reason", [ABORT, STOP])
async def test_leaving_aborts_at_the_engine(plane: Plane, reason: str) -> None:
    async with plane.reader() as reader:
        outputs = reader.ask("a")
        first = asyncio.ensure_future(anext(outputs))
        await until(lambda: plane.sink.submitted)
        plane.server.deliver([RequestOutput("a", 0, [1])])
        await first
        if reason == STOP:
            reader.router.stopped("a")
        await outputs.aclose()
        await until(lambda: plane.sink.aborted)
        plane.server.deliver([RequestOutput("a", 1, [2])])
    assert plane.sink.aborted == [("a", reason)]


async def test_nobody_aborts_what_another_reader_asked_for(plane: Plane) -> None:
    async with plane.reader("one") as one, plane.reader("two") as two:
        taken = asyncio.ensure_future(anext(one.ask("a")))
        await until(lambda: plane.sink.submitted)
        two.client.abort("a", ABORT)
        await two.client.connected()
        plane.server.deliver([RequestOutput("a", 0, [1], LENGTH)])
        assert (await taken).token_ids == [1]
    assert plane.sink.aborted == []


async def test_a_key_that_was_not_handed_out_or_is_revoked_is_not_heard(plane: Plane) -> None:
    ticket = plane.server.attach("reader")
    public, secret = zmq.curve_keypair()
    stranger = Reader(replace(ticket, public_key=public.decode(), secret_key=secret.decode()))
    with pytest.raises(EngineDeadError, match="does not answer"):
        await stranger.client.connected()
    stranger.end()
    plane.server.detach("reader")
    revoked = Reader(ticket)
    with pytest.raises(EngineDeadError, match="does not answer"):
        await revoked.client.connected()
    revoked.end()
    assert plane.sink.submitted == []


async def test_a_reader_that_lags_gets_steps_merged_and_all_of_them(plane: Plane) -> None:
    ticket = plane.server.attach("reader")
    dealer = CurveDealer(ticket)
    encode = msgspec.msgpack.encode
    dealer.socket.send(encode(ReaderLetter(0, Submit("a", [5], SAMPLING, AUTO))))
    await until(lambda: plane.sink.submitted)
    num_steps = 50 * WINDOW
    for i in range(num_steps):
        plane.server.deliver([RequestOutput("a", i, [i])])
    waiting = plane.server._readers["reader"].waiting
    assert len(waiting) == 1, "what waits for it is one output"
    assert plane.server._readers["reader"].num_sent == WINDOW
    dealer.close()

    # the same through a client, which says what it has taken
    async with plane.reader("other") as reader:
        outputs = reader.ask("b")
        first = asyncio.ensure_future(anext(outputs))
        await until(lambda: len(plane.sink.submitted) == 2)
        for i in range(num_steps):
            plane.server.deliver([RequestOutput("b", i, [i])])
        plane.server.deliver([RequestOutput("b", num_steps, [num_steps], LENGTH)])
        got = [await first, *[output async for output in outputs]]
    assert [token for output in got for token in output.token_ids] == list(range(num_steps + 1))
    assert sum(output.num_steps for output in got) == num_steps + 1
    assert len(got) < num_steps / 2


async def test_a_lost_letter_of_the_coordinator_ends_the_connection(plane: Plane) -> None:
    async with plane.reader() as reader:
        first = asyncio.ensure_future(anext(reader.ask("a")))
        await until(lambda: plane.sink.submitted)
        plane.server._readers["reader"].num_sent += 1
        plane.server.deliver([RequestOutput("a", 0, [1])])
        with pytest.raises(EngineDeadError, match="letters 1 to 1 of the coordinator were lost"):
            await reader.running
        assert not first.done(), "what came after the gap is not shown"
        reader.router.fail_all("lost")
        with pytest.raises(EngineDeadError, match="lost"):
            await first


async def test_a_last_letter_that_is_lost_is_noticed_too(plane: Plane) -> None:
    async with plane.reader() as reader:
        plane.server._readers["reader"].num_sent += 1  # nothing follows by itself but the answers to renewals
        with pytest.raises(EngineDeadError, match="were lost"):
            await asyncio.wait_for(reader.running, 20)


async def test_a_lost_letter_of_a_reader_makes_the_server_forget_it(plane: Plane) -> None:
    async with plane.reader() as reader:
        asking = asyncio.ensure_future(anext(reader.ask("a")))
        await until(lambda: plane.sink.submitted)
        detached = asyncio.ensure_future(plane.server.detached("reader"))
        reader.client._num_sent += 1
        reader.client.abort("another", ABORT)
        await asyncio.wait_for(detached, 20)
        assert plane.sink.aborted == [("a", ABORT)]
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking


async def test_what_cannot_be_understood_makes_the_server_forget_the_reader(plane: Plane) -> None:
    dealer = CurveDealer(plane.server.attach("reader"))
    detached = asyncio.ensure_future(plane.server.detached("reader"))
    dealer.socket.send(msgspec.msgpack.encode(["not", "a letter"]))
    await asyncio.wait_for(detached, 20)
    dealer.close()
    async with plane.reader("another"):
        pass


async def test_a_reader_that_is_silent_is_forgotten_and_its_requests_aborted(plane: Plane) -> None:
    dealer = CurveDealer(plane.server.attach("reader"))
    dealer.socket.send(msgspec.msgpack.encode(ReaderLetter(0, Submit("a", [5], SAMPLING, AUTO))))
    await until(lambda: plane.sink.submitted)
    async with plane.reader("alive") as alive:
        await asyncio.wait_for(plane.server.detached("reader"), 20)
        await asyncio.sleep(2 * LEASE_S)
        assert not alive.running.done(), "one that renews its lease is not forgotten"
        assert set(plane.server._readers) == {"alive"}
    assert plane.sink.aborted == [("a", ABORT)]
    dealer.close()


async def test_a_reader_whose_connection_is_gone_is_forgotten_with_the_next_output(plane: Plane) -> None:
    dealer = CurveDealer(plane.server.attach("reader"))
    dealer.socket.send(msgspec.msgpack.encode(ReaderLetter(0, Submit("a", [5], SAMPLING, AUTO))))
    await until(lambda: plane.sink.submitted)
    dealer.close()

    def deliver() -> bool:
        plane.server.deliver([RequestOutput("a", 0, [1])])
        return bool(plane.sink.aborted)

    started = asyncio.get_running_loop().time()
    await until(deliver)
    assert plane.sink.aborted == [("a", ABORT)]
    assert asyncio.get_running_loop().time() - started < LEASE_S


async def test_a_coordinator_that_falls_silent_is_given_up(plane: Plane) -> None:
    async with plane.reader() as reader:
        plane.server._socket.close()  # it hears nothing any more, and its connection stands
        with pytest.raises(EngineDeadError, match="the coordinator is silent"):
            await asyncio.wait_for(reader.running, 20)


async def test_a_closed_client_takes_nothing(plane: Plane) -> None:
    async with plane.reader() as reader:
        pass
    with pytest.raises(EngineDeadError, match="send it again"):
        await anext(reader.ask("a"))
    assert plane.sink.submitted == []


def test_every_message_survives_the_wire() -> None:
    for message in (Submit("a", [1, 2], SAMPLING, DRAFTED), Abort("a", STOP), Renew()):
        letter = ReaderLetter(3, message)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(letter), type=ReaderLetter) == letter
