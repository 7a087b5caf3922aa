"""The other end of `benchmarks.serving`: a process that runs closed loops of streams and reports each request.

``python -m penstock.benchmarks.stream_peer http URL MODEL`` asks a server and reads bytes as they come, unparsed until
the loops are over, so that little of the machine goes to the client. ``... engine CONFIG``, CONFIG being JSON, runs the
engine itself in this process. Both read one job a line from standard input and answer each with one line: JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..cluster.api.chat_tokenizer import ChatTokenizer
from ..cluster.client.llm import make_ranks
from ..cluster.config import EngineConfig
from ..cluster.engine.async_engine import AsyncEngine
from ..cluster.engine.engine import Engine
from ..workers.sampling_params import SamplingParams

Chat = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Job:
    """``streams`` loops; loop i sends chats i, i + streams, ... one after the other."""

    streams: int
    chats: list[Chat]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Served:
    """One request: seconds to the first token and to the last, and output tokens."""

    ttft_s: float
    total_s: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a job came to."""

    requests: list[Served]
    wall_s: float
    cpu_s: float
    """CPU time of this process."""


async def run_job(
    job: Job, ask: Callable[[Any, int], Awaitable[Any]], finish: Callable[[Any], Served], chats: list[Any]
) -> Report:
    """Run the loops; ``ask`` does one request, ``finish`` makes something of it when all are over."""

    async def loop(first: int) -> list[Any]:
        return [await ask(chats[i], job.max_tokens) for i in range(first, len(chats), job.streams)]

    cpu, started = time.process_time(), time.perf_counter()
    loops = await asyncio.gather(*[loop(i) for i in range(job.streams)])
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    return Report([finish(answer) for answers in loops for answer in answers], wall_s, cpu_s)


class HttpPeer:
    """Asks a server over HTTP."""

    def __init__(self, url: str, model: str) -> None:
        import aiohttp

        self._url, self._model = f"{url}/v1/chat/completions", model
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=600)
        )

    async def run(self, job: Job) -> Report:
        """Run the loops."""
        return await run_job(job, self._ask, self._finish, job.chats)

    async def _ask(self, chat: Chat, max_tokens: int) -> tuple[float, float, float, list[bytes]]:
        body = {
            "model": self._model,
            "messages": chat,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        first, parts = 0.0, []
        started = time.perf_counter()
        async with self._session.post(self._url, json=body) as response:
            async for part in response.content.iter_any():
                first = first or time.perf_counter()
                parts.append(part)
        return started, first, time.perf_counter(), parts

    @staticmethod
    def _finish(answer: tuple[float, float, float, list[bytes]]) -> Served:
        started, first, last, parts = answer
        text = b"".join(parts).decode()
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        if len(events) < 2 or events[-1] != "[DONE]":
            raise RuntimeError(f"the server did not complete a stream: {text[-300:]}")
        return Served(first - started, last - started, json.loads(events[-2])["usage"]["completion_tokens"])

    async def close(self) -> None:
        """Let go of connections."""
        await self._session.close()


class EnginePeer:
    """Runs the engine in this process."""

    def __init__(self, config: EngineConfig) -> None:
        self._tokenizer = ChatTokenizer(config.tokenizer_source, config.revision)
        self._engine = AsyncEngine(Engine(config, make_ranks(config)))

    async def run(self, job: Job) -> Report:
        """Run the loops; prompts are tokenized before."""
        return await run_job(job, self._ask, lambda served: served, [self._tokenizer.encode_chat(c) for c in job.chats])

    async def _ask(self, prompt: list[int], max_tokens: int) -> Served:
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        first, num_tokens = 0.0, 0
        started = time.perf_counter()
        async for output in self._engine.generate(uuid.uuid4().hex, prompt, sampling):
            first = first or time.perf_counter()
            num_tokens += len(output.token_ids)
        return Served(first - started, time.perf_counter() - started, num_tokens)

    async def close(self) -> None:
        """Stop the engine."""
        await self._engine.close()


async def main(arguments: list[str]) -> None:
    """Serve jobs until standard input ends."""
    kind, *rest = arguments
    peer = HttpPeer(*rest) if kind == "http" else EnginePeer(EngineConfig.from_mapping(json.loads(rest[0])))
    try:
        print(json.dumps({"ready": True}), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            report = await peer.run(Job(**json.loads(line)))
            print(json.dumps(asdict(report)), flush=True)
    finally:
        await peer.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
