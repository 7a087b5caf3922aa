"""Minutes of what clients do to a server, and what is left of it: memory, KV blocks, processes, the same tokens.

Clients come at random to the demo on two ranks: prompts of a few tokens and of hundreds, answers of one token and of
hundreds, greedy and seeded; some read slowly, some leave in the middle or before the first token, some send nonsense.
Every greedy answer to a prompt must repeat the first one, token for token. The memory (RSS) of every process of the
server is sampled; a line is fitted to the second half of the samples of each. 20 minutes; ``--quick`` takes 90 seconds,
which say nothing of memory.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from .. import demo
from ..cluster.client.http_client import HttpClient
from ..demo import prompts
from ..demo.records import FAMILIES
from .harness import Measurement, Options, Row, Target, run
from .http_stream import COMPLETED, LOST, REFUSED, Answer, ask
from .server_process import ServerProcess, name_of, serving

DEMO = Path(demo.__file__).parent / "model"
NAME = "demo"
NUM_RANKS = 2
NUM_CLIENTS = 24
"""Fewer than may run and wait at once, so that none is refused."""
MINUTES, QUICK_MINUTES = 20.0, 1.5
SAMPLE_S = 5.0
IDLE_S = 60.0
WAIT_S = 300.0
MAX_GROWTH_MB = 5.0
"""Per process and ten minutes: above the noise of such a fit (1 MB), below half a kilobyte a request."""
_MB = 1 << 20

Chat = list[dict[str, str]]


@dataclass(slots=True)
class Tally:
    """What happened so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    altered: int = 0
    errors: list[str] = field(default_factory=list)
    first: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    """Tokens of each greedy request the first time it was completed."""

    def take(self, key: tuple[str, int] | None, answer: Answer) -> None:
        """Count an answer; ``key`` names a greedy request."""
        self.outcomes[answer.outcome] += 1
        self.num_tokens += len(answer.token_ids)
        if answer.outcome == LOST:
            self.errors.append(answer.error or f"status {answer.status}, {len(answer.token_ids)} tokens")
        if key is not None and answer.outcome == COMPLETED:
            self.altered += self.first.setdefault(key, answer.token_ids) != answer.token_ids


class Client:
    """One client that sends request after request, each of a random kind, until the time is over."""

    def __init__(self, session: aiohttp.ClientSession, url: str, tally: Tally, seed: int) -> None:
        self._session, self._url, self._tally = session, url, tally
        self._random = random.Random(seed)
        self._chats = [record.chat() for family in FAMILIES for record in prompts.load(family)]

    async def run(self, until: float) -> None:
        """Ask until the monotonic clock says ``until``."""
        kinds = {self._read: 10, self._leave: 4, self._read_slowly: 1, self._leave_at_once: 2, self._talk_nonsense: 1}
        while time.monotonic() < until:
            (act,) = self._random.choices(list(kinds), list(kinds.values()))
            await act()
            await asyncio.sleep(self._random.expovariate(4.0))

    def _body(self) -> tuple[dict[str, Any], tuple[str, int] | None]:
        """Return a request and, if it is greedy, its name."""
        pick = self._random
        index = pick.randrange(len(self._chats))
        chat = self._chats[index]
        if pick.random() < 0.1:  # hundreds of tokens
            chat = [{"role": "user", "content": "\n".join([chat[0]["content"]] * pick.randrange(2, 8))[:3000]}]
        max_tokens = pick.choice((1, 8, 32, 32, 96, 200))
        body = {"model": NAME, "messages": chat, "max_tokens": max_tokens}
        if pick.random() < 0.5:
            return {**body, "temperature": 0.8, "seed": pick.randrange(1 << 30)}, None
        return {**body, "temperature": 0}, (str(chat), max_tokens)

    async def _read(self) -> None:
        body, key = self._body()
        self._tally.take(key, await ask(self._session, self._url, body))

    async def _read_slowly(self) -> None:
        body, key = self._body()

        async def wait(number: int) -> bool:
            await asyncio.sleep(0.2)
            return True

        self._tally.take(key, await ask(self._session, self._url, body, wait))

    async def _leave(self) -> None:
        body, _ = self._body()
        last = self._random.randrange(1, 30)

        async def stay(number: int) -> bool:
            return number < last

        self._tally.take(None, await ask(self._session, self._url, {**body, "ignore_eos": True}, stay))

    async def _leave_at_once(self) -> None:
        body, _ = self._body()
        asking = asyncio.create_task(ask(self._session, self._url, body))
        await asyncio.sleep(self._random.uniform(0, 0.1))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        self._tally.outcomes["left before the first token"] += 1

    async def _talk_nonsense(self) -> None:
        body, _ = self._body()
        wrong = self._random.choice(({"temperature": 9}, {"max_tokens": 10**6}, {"messages": [7]}, {"model": "other"}))
        answer = await ask(self._session, self._url, {**body, **wrong})
        if answer.status in (400, 404):
            self._tally.outcomes["told what was wrong"] += 1
        else:
            self._tally.take(None, answer)


class Memory:
    """The RSS of every process of a server over time."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._started = time.monotonic()
        self._samples: defaultdict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
        """(seconds, MB) by name and process id."""

    async def watch(self, until: float) -> None:
        """Sample until the monotonic clock says ``until``."""
        while time.monotonic() < until:
            self.sample()
            await asyncio.sleep(SAMPLE_S)

    def sample(self) -> None:
        """Read once."""
        now = time.monotonic() - self._started
        for _, process in self._server.family():
            try:
                self._samples[name_of(process), process.pid].append((now, process.memory_info().rss / _MB))
            except psutil.NoSuchProcess:
                continue

    def rows(self) -> list[Row]:
        """Return a row for every process that was there from the first sample to the last."""
        last = max(samples[-1][0] for samples in self._samples.values())
        rows: list[Row] = []
        for (name, pid), samples in sorted(self._samples.items()):
            if samples[0][0] > SAMPLE_S or samples[-1][0] < last - SAMPLE_S:
                continue
            second_half = [sample for sample in samples if sample[0] >= last / 2]
            rows.append(
                {
                    "process": name,
                    "pid": pid,
                    "samples": len(samples),
                    "first_mb": round(samples[0][1], 1),
                    "middle_mb": round(second_half[0][1], 1),
                    "last_mb": round(samples[-1][1], 1),
                    "growth_mb_per_10_min": round(600 * slope(second_half), 2),
                }
            )
        return rows


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the line of least squares through (x, y)."""
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def measure(options: Options) -> Measurement:
    """Churn, wait until the server is idle, and look at what is left."""
    minutes = QUICK_MINUTES if options.quick else MINUTES
    config = {"served-model-name": NAME, "expert-parallel-size": NUM_RANKS, "dtype": "float32", "device": "cpu"}
    flags = [word for name, value in config.items() for word in (f"--{name}", str(value))]
    with serving(["serve", str(DEMO), *flags, "--num-threads", "1"]) as server:
        workers = _workers(server)
        tally, memory = asyncio.run(_churn(server, 60 * minutes, options.seed))
        idle = _becomes_idle(server)
        restarts = len(workers - _workers(server))
    for error in tally.errors[:5]:
        print(f"lost: {error}", file=sys.stderr)
    rows: list[Row] = [
        {
            "minutes": minutes,
            "clients": NUM_CLIENTS,
            "output_tokens": tally.num_tokens,
            "altered": tally.altered,
            **{outcome.replace(" ", "_"): count for outcome, count in sorted(tally.outcomes.items())},
        },
        *memory.rows(),
    ]
    targets = [
        Target("requests lost or refused", tally.outcomes[LOST] + tally.outcomes[REFUSED], at_most=0),
        Target("greedy answers that differ from the first to the same request", tally.altered, at_most=0),
        Target("requests completed", tally.outcomes[COMPLETED], at_least=60 * minutes),
        Target("processes of the gang that were replaced", restarts, at_most=0),
        Target("engine idle and its KV blocks free at the end, 1 if so", float(idle), at_least=1),
    ]
    if not options.quick:
        worst = max(rows[1:], key=lambda row: float(row["growth_mb_per_10_min"] or 0))
        name = f"MB per 10 minutes that the process which grows most grew ({worst['process']})"
        targets.append(Target(name, float(worst["growth_mb_per_10_min"] or 0), at_most=MAX_GROWTH_MB))
    return Measurement(rows, targets, "float32", 1)


async def _churn(server: ServerProcess, duration_s: float, seed: int) -> tuple[Tally, Memory]:
    tally, memory = Tally(), Memory(server)
    until = time.monotonic() + duration_s
    timeout = aiohttp.ClientTimeout(total=WAIT_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        clients = [Client(session, server.url, tally, seed + i) for i in range(NUM_CLIENTS)]
        await asyncio.gather(memory.watch(until), *(client.run(until) for client in clients))
    memory.sample()
    return tally, memory


def _workers(server: ServerProcess) -> set[int]:
    return {process.pid for role, process in server.family() if role in ("rank", "coordinator", "ingress", "gang")}


def _becomes_idle(server: ServerProcess) -> bool:
    """Tell whether nothing runs, waits or holds KV blocks, at the latest after ``IDLE_S``."""
    client = HttpClient(server.url)
    try:
        deadline = time.monotonic() + IDLE_S
        while time.monotonic() < deadline:
            stats = client.stats()
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            if all(stats[f"penstock:{name}"] == 0 for name in names):
                return True
            time.sleep(0.5)
    finally:
        client.close()
    return False


if __name__ == "__main__":
    sys.exit(run("churn", measure))
