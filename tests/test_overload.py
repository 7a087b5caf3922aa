"""More than the engine can do: requests wait, are refused or time out, and the others do not notice."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.api.openai_api import ServingState, create_app
from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.async_engine import AsyncEngine
from penstock.cluster.engine.backend import EngineDeadError, QueueFullError
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.engine_thread import EngineThread
from penstock.cluster.engine.output import ABORT, LENGTH, TIMEOUT, RequestOutput
from penstock.workers.plan import StepPlan, StepResult
from penstock.workers.sampling_params import SamplingParams

from .scripted_backend import LoopbackServer
from .scripted_ranks import ScriptedRanks, continuation

MODEL = "scripted"
BLOCK_SIZE = 16


class GatedRanks(ScriptedRanks):
    """Each step waits for a permit, and says when it has begun."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.permits, self.begun = threading.Semaphore(0), threading.Semaphore(0)

    def step(self, plan: StepPlan) -> StepResult:
        self.begun.release()
        assert self.permits.acquire(timeout=30)
        return super().step(plan)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens)


def make_config(**options: Any) -> EngineConfig:
    return EngineConfig(**{"model": "m", "block_size": BLOCK_SIZE, "draft_len": 0, **options})


# --- the engine ----------------------------------------------------------------------------------------------------


def test_a_request_over_its_time_ends_wherever_it_is_and_frees_its_blocks() -> None:
    clock = Clock()
    config = make_config(request_timeout_s=10.0, max_num_seqs=2)
    engine = Engine(config, ScriptedRanks([16], BLOCK_SIZE, 200), clock=clock)
    for name in ("a", "b", "waiting"):
        engine.add_request(name, [4, 5], greedy(100))
    clock.now = 5.0
    engine.add_request("late", [4], greedy(6))
    outputs = [output for _ in range(3) for output in engine.step()]
    assert {output.request_id for output in outputs} == {"a", "b"}
    clock.now = 10.0
    assert not [output for output in engine.step() if output.error], "to the limit is in time"
    clock.now = 10.5
    last = {output.request_id: output for output in engine.step() if output.finish_reason}
    assert [(name, output.finish_reason) for name, output in last.items()] == [
        ("a", TIMEOUT), ("b", TIMEOUT), ("waiting", TIMEOUT),
    ]  # fmt: skip
    assert [output.offset for output in last.values()] == [5, 5, 0]
    assert last["a"].error == "the request took longer than request_timeout_s = 10 s"
    engine.scheduler.check_integrity()
    assert engine.stats().num_kv_blocks_used == 0
    got: list[int] = []
    while engine.has_requests:
        got += [token for output in engine.step() for token in output.token_ids]
    assert got == continuation([4], 6)
    stats = engine.stats()
    assert stats.num_requests_finished == {TIMEOUT: 3, LENGTH: 1}
    assert sum(stats.latencies["e2e_request_latency"].counts) == 1
    assert sum(stats.latencies["time_to_first_token"].counts) == 3


def test_a_request_that_another_engine_had_is_in_time_by_when_it_came() -> None:
    clock = Clock()
    clock.now = 100.0
    engine = Engine(make_config(request_timeout_s=10.0), ScriptedRanks([16], BLOCK_SIZE, 200), clock=clock)
    engine.add_request("new", [4, 5], greedy(100))
    engine.add_request("old", [4, 5], greedy(100), arrival_s=95.0)
    ended = []
    for now in (105.0, 105.5, 110.0, 110.5):
        clock.now = now
        ended.append([output.request_id for output in engine.step() if output.finish_reason == TIMEOUT])
    assert ended == [[], ["old"], [], ["new"]]


def test_prompt_tokens_count_when_they_are_computed_and_once() -> None:
    ranks = ScriptedRanks([6], BLOCK_SIZE, 96)
    engine = Engine(make_config(max_num_batched_tokens=32), ranks)
    engine.add_request("a", [4] * 40, greedy(50))
    seen = []
    for _ in range(3):
        engine.step()
        seen.append(engine.stats().num_prompt_tokens)
    assert seen == [32, 40, 40]
    engine.add_request("b", [4] * 20, greedy(70))
    while engine.has_requests:
        engine.step()
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_prompt_tokens == 60


def test_latencies_are_those_of_the_clock() -> None:
    clock = Clock()
    engine = Engine(make_config(max_num_seqs=1), ScriptedRanks([16], BLOCK_SIZE, 200), clock=clock)
    for name in ("a", "b"):
        engine.add_request(name, [4, 5], greedy(5))
    while engine.has_requests:
        clock.now += 1.0
        engine.step()
    totals = {name: histogram.total for name, histogram in engine.stats().latencies.items()}
    # a is admitted at 1 and gets its tokens at 1, 2, 3, 4, 5; b is admitted at 6
    assert totals == {
        "request_queue_time": 1 + 6,
        "time_to_first_token": 1 + 6,
        "request_prefill_time": 0,
        "inter_token_latency": 4 + 4,
        "time_per_output_token": 1 + 1,
        "request_decode_time": 4 + 4,
        "e2e_request_latency": 5 + 10,
    }
    assert engine.stats().latencies["inter_token_latency"].counts[13] == 8


# --- the engine's thread -------------------------------------------------------------------------------------------


def test_totals_and_refusals_do_not_wait_for_the_step() -> None:
    ranks = GatedRanks([64], BLOCK_SIZE, 200)
    thread = EngineThread(Engine(make_config(max_num_seqs=2, max_queued_requests=3), ranks), lambda outputs: None)
    try:
        thread.submit("first", [4], greedy(2))
        assert ranks.begun.acquire(timeout=30)
        # The first step hangs from here on
        for index in range(4):
            thread.submit(str(index), [4], greedy(2))
        with pytest.raises(QueueFullError, match="max_queued_requests"):
            thread.submit("one too many", [4], greedy(2))
        with pytest.raises(QueueFullError):
            thread.submit("two too many", [4], greedy(2))
        stats = thread.stats()
        assert (stats.num_steps, stats.num_requests_refused) == (0, 2)
        ranks.permits.release()
        assert ranks.begun.acquire(timeout=30)
        assert thread.stats().num_generation_tokens == 1
        # Two run, three wait: one of the places that were left is free
        with pytest.raises(QueueFullError):
            thread.submit("still too many", [4], greedy(2))
        thread.abort("3")
        # The first request and the one aborted have left when this step and the next are done
        ranks.permits.release(2)
        for _ in range(2):
            assert ranks.begun.acquire(timeout=30)
        thread.submit("after one has left", [4], greedy(2))
    finally:
        ranks.permits.release(100)
        thread.close()
    with pytest.raises(EngineDeadError):
        thread.stats()


# --- the server ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def served(
    ranks: ScriptedRanks, tokenizer: ChatTokenizer, **options: Any
) -> AsyncIterator[tuple[str, AsyncEngine]]:
    started = asyncio.Event()
    backend = AsyncEngine(Engine(make_config(**options), ranks))
    server = LoopbackServer(create_app(await ServingState.create(backend, tokenizer, MODEL)), started.set)
    # Small, so that a reader who stalls is felt at once; the connections inherit it
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    running = asyncio.create_task(server.run_here())
    await started.wait()
    try:
        yield server.url, backend
    finally:
        server.should_exit = True
        await running
        await backend.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def body(prompt: list[int], max_tokens: int, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **fields}


async def test_256_clients_on_a_queue_of_64(tokenizer: ChatTokenizer) -> None:
    """Every request completes with its exact text or is refused with 429 and a time to come again; none is lost."""
    ranks = ScriptedRanks([40, 30], BLOCK_SIZE, 400, step_s=0.002)
    options = {"max_num_seqs": 8, "max_queued_requests": 64, "draft_len": 2, "max_num_batched_tokens": 64}
    prompts = [[4 + (i * k) % 5 for k in range(1, 20 + i % 60)] for i in range(256)]
    async with served(ranks, tokenizer, **options) as (url, backend):
        limits = httpx.Limits(max_connections=256)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:

            async def ask(i: int) -> httpx.Response:
                return await http.post("/v1/completions", json=body(prompts[i], 40 + i % 80, stream=i % 2 == 1))

            answers = await asyncio.gather(*map(ask, range(256)))
            metrics = (await http.get("/metrics")).text
        stats = (await backend.stats())["0"]
    refused = [answer for answer in answers if answer.status_code == 429]
    # Pools that are too small for all places may have more of them waiting when the last clients come
    assert 256 - 64 >= len(refused) > 0, "what may wait is taken"
    for answer in refused:
        assert answer.json()["error"]["code"] == "queue_full"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    for i, answer in enumerate(answers):
        if answer.status_code == 429:
            continue
        assert answer.status_code == 200
        if i % 2:
            events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
            assert events[-1] == "[DONE]"
            text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
        else:
            text = answer.json()["choices"][0]["text"]
        assert text == tokenizer.decode(continuation(prompts[i], 40 + i % 80))
    assert stats.num_requests_refused == len(refused)
    assert stats.num_requests_finished == {LENGTH: 256 - len(refused)}
    assert stats.num_preemptions > 0, "the pools are too small for all that run"
    assert (stats.num_kv_blocks_used, stats.num_requests_running, stats.num_requests_waiting) == (0, 0, 0)
    assert f'penstock:request_queue_full_total{{gang="0"}} {len(refused)}.0' in metrics
    assert f'penstock:e2e_request_latency_seconds_count{{gang="0"}} {256 - len(refused)}.0' in metrics


async def test_a_timeout_is_a_408_or_the_last_event_of_a_stream(tokenizer: ChatTokenizer) -> None:
    ranks = ScriptedRanks([800], BLOCK_SIZE, 12_000, step_s=0.002)
    async with served(ranks, tokenizer, request_timeout_s=1.0) as (url, backend):
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            whole, stream = await asyncio.gather(
                http.post("/v1/completions", json=body([4], 11_000)),
                http.post("/v1/completions", json=body([4], 11_000, stream=True)),
            )
        stats = (await backend.stats())["0"]
    assert whole.status_code == 408
    assert whole.json()["error"]["code"] == "request_timeout"
    assert "request_timeout_s = 1 s" in whole.json()["error"]["message"]
    assert stream.status_code == 200
    *texts, last = [json.loads(line.removeprefix("data: ")) for line in stream.text.split("\n\n") if line]
    assert len(texts) > 10
    assert last["error"]["code"] == "request_timeout"
    assert stats.num_requests_finished == {TIMEOUT: 2}
    assert stats.num_kv_blocks_used == 0


async def test_a_reader_that_stalls_holds_up_nobody(tokenizer: ChatTokenizer) -> None:
    """Its output grows to what it asked for and no further, the engine is done with it long before it has read that."""
    # Steps in which the server writes what the last one gave: tokens that are merged all fit into the socket
    ranks = ScriptedRanks([800], BLOCK_SIZE, 12_000, step_s=0.0002)
    async with served(ranks, tokenizer) as (url, backend):
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        payload = json.dumps(body([4], 4_000, stream=True)).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
        stalled.sendall(head + payload)
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            for index in range(5):
                answer = await http.post("/v1/completions", json=body([4, 4 + index], 50))
                expected = tokenizer.decode(continuation([4, 4 + index], 50))
                assert answer.json()["choices"][0]["text"] == expected
            finished = {LENGTH: 6}
            while (await backend.stats())["0"].num_requests_finished != finished:
                await asyncio.sleep(0.01)
            # The engine is done; the text waits as one output behind what fits into the socket
            (reader,) = backend._router._readers.values()
            assert len(reader.mailbox) == 1
            assert reader.num_received == 4_000
            assert (await backend.stats())["0"].num_kv_blocks_used == 0
            loop = asyncio.get_running_loop()
            received = bytearray()
            while not received.endswith(b"0\r\n\r\n"):
                received += await loop.run_in_executor(None, stalled.recv, 1 << 20)
        stalled.close()
        await until(lambda: not backend._router._readers)
    events = [line for line in received.decode().split("\r\n") if line.startswith("data: {")]
    text = "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events)
    assert text == tokenizer.decode(continuation([4], 4_000))


async def test_a_client_that_goes_while_it_waits_leaves_the_queue(tokenizer: ChatTokenizer) -> None:
    ranks = GatedRanks([64], BLOCK_SIZE, 200)
    async with served(ranks, tokenizer, max_num_seqs=1, max_queued_requests=1) as (url, backend):
        try:
            async with httpx.AsyncClient(base_url=url, timeout=60) as http:
                first = asyncio.create_task(http.post("/v1/completions", json=body([4], 8)))
                assert await asyncio.to_thread(ranks.begun.acquire, timeout=30)
                gone = asyncio.create_task(http.post("/v1/completions", json=body([5], 8)))
                await until(lambda: len(backend._router._readers) == 2)
                refused = await http.post("/v1/completions", json=body([6], 8))
                assert refused.status_code == 429
                gone.cancel()
                await until(lambda: len(backend._router._readers) == 1)
                ranks.permits.release(3)
                while (await backend.stats())["0"].num_requests_finished != {ABORT: 1}:
                    await asyncio.sleep(0.005)
                second = asyncio.create_task(http.post("/v1/completions", json=body([6], 8)))
                await until(lambda: len(backend._router._readers) == 2)
                ranks.permits.release(100)
                assert [answer.status_code for answer in await asyncio.gather(first, second)] == [200, 200]
        finally:
            ranks.permits.release(1000)


def test_outputs_merge_only_when_they_follow_one_another() -> None:
    with pytest.raises(AssertionError):
        RequestOutput("r", 0, [1]).followed_by(RequestOutput("r", 2, [3]))
