"""Faults under streaming clients: what of the streams is lost, how long they pause, what is left behind.

Clients stream long answers of the demo on two ranks and a spare, greedy and seeded, without retries. Faults come in an
order drawn from the seed, each when the gang is whole again. Every stream is compared with the answer of a run without
faults, token for token; a difference is excused where the two best tokens are closer than float32 tells apart. After a
fault that cuts streams, which only the ingress' death is, the client must get an error, and asks again with the same
seed. 105 faults take half an hour; ``--quick`` has one of each of four kinds.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp

from .. import demo
from ..cluster.api.chat_tokenizer import ChatTokenizer
from ..cluster.client.http_client import HttpClient
from ..demo import prompts
from ..demo.records import FAMILIES
from ..workers.sampling_params import SamplingParams
from .faults import FAULTS, Fault, leftovers, spares_are_ready
from .harness import Measurement, Options, Row, Target, run
from .http_stream import COMPLETED, LOST, Answer, ask
from .server_process import ServerProcess, serving
from .ties import EXCUSED_GAP, gap

DEMO = Path(demo.__file__).parent / "model"
NAME = "demo"
NUM_RANKS, NUM_SPARES, NUM_CLIENTS = 2, 1, 6
STEP_TIMEOUT_S = 3.0
MAX_TOKENS = 300
NUM_QUESTIONS = 24
NUM_FAULTS = 105
QUICK = ("SIGKILL of a rank", "SIGSTOP of a rank", "SIGKILL of the coordinator", "SIGKILL of the ingress")
WAIT_S = 180.0
_POLL_S = 0.1
_TAKES_EFFECT_S = 1.0


@dataclass(frozen=True, slots=True)
class Question:
    """One request, the same whenever it is asked."""

    messages: list[dict[str, str]]
    temperature: float
    seed: int

    def body(self) -> dict[str, Any]:
        """Return the request."""
        sampled = {"temperature": self.temperature, "seed": self.seed}
        return {"model": NAME, "messages": self.messages, "max_tokens": MAX_TOKENS, "ignore_eos": True, **sampled}


@dataclass(slots=True)
class Tally:
    """What became of all streams."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[int, list[int]]] = field(default_factory=list)
    """(question, tokens) of completed streams that differ."""
    errors: list[str] = field(default_factory=list)
    num_tokens: int = 0
    longest_gap_s: float = 0.0


class Client:
    """Asks one question after another until told to stop."""

    def __init__(self, url: str, questions: list[Question], wanted: list[list[int]], tally: Tally, seed: int) -> None:
        self._url, self._questions, self._wanted, self._tally = url, questions, wanted, tally
        self._random = random.Random(seed)
        self.times: list[float] = []
        """When events came, by the monotonic clock."""
        self.may_be_cut = False
        self.stopped = False

    async def run(self) -> None:
        """Ask."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WAIT_S)) as session:
            while not self.stopped:
                await self._ask(session, self._random.randrange(len(self._questions)))

    async def _ask(self, session: aiohttp.ClientSession, number: int) -> None:
        started = last = time.monotonic()

        async def take(_: int) -> bool:
            nonlocal last
            last, before = time.monotonic(), last
            self._tally.longest_gap_s = max(self._tally.longest_gap_s, last - before)
            self.times.append(last)
            return True

        answer = await ask(session, self._url, self._questions[number].body(), take)
        self._tally.num_tokens += len(answer.token_ids)
        if answer.outcome == COMPLETED:
            same = answer.token_ids == self._wanted[number]
            self._tally.outcomes["completed" if same else "different"] += 1
            if not same:
                self._tally.wrong.append((number, answer.token_ids))
        elif self.may_be_cut:
            # It is asked again, from the start
            self._tally.outcomes["cut" if answer.status == 200 else "nobody listens"] += 1
            assert answer.outcome == LOST
            wanted = self._wanted[number]
            if answer.token_ids != wanted[: len(answer.token_ids)]:
                self._tally.wrong.append((number, answer.token_ids))
            await asyncio.sleep(0.2)
            await self._ask(session, number)
        else:
            self._tally.outcomes["lost"] += 1
            self._tally.errors.append(f"after {time.monotonic() - started:.1f} s: {answer.error or answer.status}")
            await asyncio.sleep(0.2)

    def longest_gap_since(self, moment: float) -> float:
        """Return the longest pause that ended after ``moment``."""
        return max(after - before for before, after in pairwise(self.times) if after > moment)


def measure(options: Options) -> Measurement:
    """Run the schedule, and look at what is left."""
    rng = random.Random(options.seed)
    faults = [fault for fault in FAULTS if not options.quick or fault.name in QUICK]
    schedule = faults * (1 if options.quick else max(1, options.given.num_faults // len(faults)))
    rng.shuffle(schedule)
    questions = _questions(rng)
    config = {"served-model-name": NAME, "expert-parallel-size": NUM_RANKS, "num-spares": NUM_SPARES}
    config |= {"dtype": "float32", "device": "cpu", "num-threads": 1, "cpus-per-rank": 0.5}
    flags = [word for name, value in config.items() for word in (f"--{name}", str(value))]
    with serving(["serve", str(DEMO), *flags, "--step-timeout-s", str(STEP_TIMEOUT_S)]) as server:
        wanted = asyncio.run(_wanted(server, questions))
        tally, rows = asyncio.run(_chaos(server, questions, wanted, schedule, options.seed))
        is_idle = _becomes_idle(server)
        roles = Counter(role for role, _ in server.family())
        surplus = roles["rank"] - NUM_RANKS - NUM_SPARES + roles["coordinator"] + roles["gang"] + roles["ingress"] - 3
        family = [process for _, process in server.family()]
    left = leftovers(family, 30.0)
    excused, altered = _judge(questions, wanted, tally)
    return Measurement(
        [*rows, _summary(tally, excused, altered)],
        _targets(rows, tally, altered, is_idle=is_idle, surplus=surplus, left=left),
        "float32",
        1,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-faults", type=int, default=NUM_FAULTS, help="how many, all kinds alike (105)")


def _questions(rng: random.Random) -> list[Question]:
    chats = [record.chat() for family in FAMILIES for record in prompts.load(family)]
    return [
        Question(chat, float(i % 2), rng.randrange(1 << 30)) for i, chat in enumerate(rng.sample(chats, NUM_QUESTIONS))
    ]


async def _wanted(server: ServerProcess, questions: list[Question]) -> list[list[int]]:
    async with aiohttp.ClientSession() as session:
        answers: list[Answer] = []
        for start in range(0, len(questions), NUM_CLIENTS):
            batch = questions[start : start + NUM_CLIENTS]
            answers += await asyncio.gather(*[ask(session, server.url, question.body()) for question in batch])
    assert all(answer.outcome == COMPLETED for answer in answers), "without faults all are served"
    return [answer.token_ids for answer in answers]


async def _chaos(
    server: ServerProcess, questions: list[Question], wanted: list[list[int]], schedule: list[Fault], seed: int
) -> tuple[Tally, list[Row]]:
    tally = Tally()
    clients = [Client(server.url, questions, wanted, tally, seed + number) for number in range(NUM_CLIENTS)]
    running = [asyncio.create_task(client.run()) for client in clients]
    rng = random.Random(seed)
    found: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    for fault in schedule:
        await asyncio.sleep(rng.uniform(0.0, 1.0))
        await _all_stream(clients, time.monotonic())
        await _until(lambda: spares_are_ready(server, NUM_RANKS, NUM_SPARES))
        found[fault.name].append(await _commit(server, fault, clients))
    for client in clients:
        client.stopped = True
    await asyncio.gather(*running)
    return tally, [_row(fault, found[fault.name]) for fault in dict.fromkeys(schedule)]


async def _commit(server: ServerProcess, fault: Fault, clients: list[Client]) -> dict[str, float]:
    """Do a fault and wait until every client's stream goes on."""
    for client in clients:
        client.times = client.times[-1:]
        client.may_be_cut = fault.cuts_streams
    await asyncio.to_thread(fault.do, server)
    moment, wall = time.monotonic(), time.time()
    # What was on its way may still come; a stopped rank is noticed only after its deadline
    await asyncio.sleep(_TAKES_EFFECT_S + (STEP_TIMEOUT_S if fault.silent else 0.0))
    await _until(lambda: spares_are_ready(server, NUM_RANKS, NUM_SPARES))
    await _all_stream(clients, time.monotonic())
    gaps = [client.longest_gap_since(moment) for client in clients]
    for client in clients:
        client.may_be_cut = False
    events = [event for event in await asyncio.to_thread(_events, server) if event["time_s"] > wall - 0.5]
    noticed = [event["time_s"] - wall for event in events if event["kind"] == "fault"]
    recovered = [event["duration_s"] for event in events if event["kind"] == "recovery"]
    return {
        "gap_s": statistics.median(gaps),
        "longest_gap_s": max(gaps),
        "noticed_s": min(noticed, default=float("nan")),
        "recovery_s": max(recovered, default=float("nan")),
        "replayed": float(sum(event["num_requests_replayed"] for event in events)),
    }


async def _all_stream(clients: list[Client], since: float) -> None:
    await _until(lambda: all(client.times and client.times[-1] > since for client in clients))


async def _until(condition: Any) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(_POLL_S)


def _events(server: ServerProcess) -> list[dict[str, Any]]:
    with suppress(Exception):  # an ingress that has just started may not answer yet
        client = HttpClient(server.url)
        try:
            return client.events()
        finally:
            client.close()
    return []


def _becomes_idle(server: ServerProcess) -> bool:
    client = HttpClient(server.url)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            stats = client.stats()
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            if all(stats[f"penstock:{name}"] == 0 for name in names):
                return True
            time.sleep(0.5)
        return False
    finally:
        client.close()


def _judge(questions: list[Question], wanted: list[list[int]], tally: Tally) -> tuple[int, int]:
    """Return how many of the different answers are excused, and how many tokens of the others are wrong."""
    tokenizer = ChatTokenizer(str(DEMO))
    excused = altered = 0
    for number, got in tally.wrong:
        question, want = questions[number], wanted[number]
        first = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
        if first is None:  # a token is missing or comes twice
            altered += abs(len(got) - len(want))
            continue
        prompt = tokenizer.encode_chat(question.messages)
        sampling = SamplingParams(temperature=question.temperature, seed=question.seed)
        if gap(DEMO, prompt + want[:first], len(prompt), sampling) < EXCUSED_GAP:
            excused += 1
        else:
            altered += len(want) - first
    return excused, altered


def _row(fault: Fault, found: list[dict[str, float]]) -> Row:
    def median(name: str) -> float | None:
        known = [one[name] for one in found if one[name] == one[name]]
        return round(statistics.median(known), 2) if known else None

    return {
        "fault": fault.name,
        "times": len(found),
        "noticed_s": median("noticed_s"),
        "recovery_s": median("recovery_s"),
        "gap_s": median("gap_s"),
        "longest_gap_s": round(max(one["longest_gap_s"] for one in found), 2),
        "requests_replayed": median("replayed"),
    }


def _summary(tally: Tally, excused: int, altered: int) -> Row:
    return {
        "fault": "all",
        "streams": tally.outcomes.total() - tally.outcomes["nobody listens"],
        "tokens": tally.num_tokens,
        "completed": tally.outcomes["completed"],
        "lost": tally.outcomes["lost"],
        "cut": tally.outcomes["cut"],
        "ties_excused": excused,
        "tokens_altered": altered,
        "longest_gap_s": round(tally.longest_gap_s, 2),
        "first_error": next(iter(tally.errors), None),
    }


def _targets(
    rows: list[Row], tally: Tally, altered: int, *, is_idle: bool, surplus: int, left: list[str]
) -> list[Target]:
    gaps = {str(row["fault"]): float(row["gap_s"] or 0.0) for row in rows}
    bounds = {
        "SIGKILL of a rank": 1.0,
        "SIGSTOP of a rank": STEP_TIMEOUT_S + 2.0,
        "SIGKILL of a rank and the spare": 15.0,
    }
    return [
        Target("streams lost", tally.outcomes["lost"], at_most=0),
        Target("tokens lost, altered or duplicated", altered, at_most=0),
        Target("KV blocks free and engine idle at the end, 1 if so", float(is_idle), at_least=1),
        Target("processes too many, or too few, before the end", abs(surplus), at_most=0),
        Target("processes left after the end", len(left), at_most=0),
        *[
            Target(f"median pause of a stream at a {name}, s", gaps[name], at_most=bound)
            for name, bound in bounds.items()
            if name in gaps
        ],
    ]


if __name__ == "__main__":
    sys.exit(run("chaos", measure, add_options=_add_options))
