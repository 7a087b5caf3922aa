"""More clients than there is room for: each is served in full or told when to come back, and none gets other tokens.

256 clients ask the demo at once; 64 requests may wait. First they take 429 for an answer, then they do as Retry-After
says until they are served. Every completed stream is compared, token for token, with what an engine in this process
says to that prompt alone, without drafts. Greedy, in float32.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from pathlib import Path

import aiohttp

from .. import demo
from ..cluster.client.http_client import HttpClient
from ..cluster.client.llm import LLM
from ..demo import prompts
from ..demo.records import FAMILIES
from .harness import Measurement, Options, Row, Target, quantile, run
from .http_stream import COMPLETED, LOST, REFUSED, Answer, ask
from .server_process import ServerProcess, serving

DEMO = Path(demo.__file__).parent / "model"
NAME = "demo"
NUM_CLIENTS = 256
MAX_QUEUED = 64
MAX_NUM_SEQS = 16
NUM_RANKS = 2
MAX_TOKENS = 64
DEADLINE_S = 600.0

Chat = list[dict[str, str]]


def measure(options: Options) -> Measurement:
    """Run both crowds and compare what they got."""
    max_tokens = MAX_TOKENS // 4 if options.quick else MAX_TOKENS
    chats = [record.chat() for family in FAMILIES for record in prompts.load(family)]
    assert len(chats) == NUM_CLIENTS
    expected = _alone(chats, max_tokens)
    config = {
        "served-model-name": NAME,
        "expert-parallel-size": NUM_RANKS,
        "dtype": "float32",
        "device": "cpu",
        "num-threads": 1,
        "max-num-seqs": MAX_NUM_SEQS,
        "max-queued-requests": MAX_QUEUED,
    }
    flags = [word for name, value in config.items() for word in (f"--{name}", str(value))]
    with serving(["serve", str(DEMO), *flags]) as server:
        crowds = {
            patience: asyncio.run(_crowd(server, chats, max_tokens, patient=patience == "until served"))
            for patience in ("once", "until served")
        }
        idle = _idle(server)
    rows = [_row(patience, max_tokens, answers, expected, wall_s) for patience, (answers, wall_s) in crowds.items()]
    return Measurement(rows, _targets(crowds["once"][0], rows, idle), "float32", 1)


def _alone(chats: list[Chat], max_tokens: int) -> list[list[int]]:
    """Return what each prompt gets when nothing else runs."""
    with LLM(str(DEMO), dtype="float32", device="cpu", num_threads=1, draft_len=0, max_num_seqs=1) as llm:
        return [llm.chat(chat, temperature=0, max_tokens=max_tokens).token_ids for chat in chats]


async def _crowd(
    server: ServerProcess, chats: list[Chat], max_tokens: int, *, patient: bool
) -> tuple[list[list[Answer]], float]:
    """Have all clients ask at once; return every answer each of them got, and how long it took."""
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def client(chat: Chat) -> list[Answer]:
            body = {"model": NAME, "messages": chat, "max_tokens": max_tokens, "temperature": 0}
            answers = [await ask(session, server.url, body)]
            while patient and answers[-1].outcome == REFUSED and time.perf_counter() - started < DEADLINE_S:
                await asyncio.sleep(answers[-1].retry_after_s or 1.0)
                answers.append(await ask(session, server.url, body))
            return answers

        started = time.perf_counter()
        answers = await asyncio.gather(*map(client, chats))
        return answers, time.perf_counter() - started


def _row(patience: str, max_tokens: int, answers: list[list[Answer]], expected: list[list[int]], wall_s: float) -> Row:
    last = Counter(client[-1].outcome for client in answers)
    altered = sum(
        client[-1].outcome == COMPLETED and client[-1].token_ids != tokens
        for client, tokens in zip(answers, expected, strict=True)
    )
    everything = [answer for client in answers for answer in client]
    refusals = [answer for answer in everything if answer.outcome == REFUSED]
    ttft_s = [client[-1].ttft_s or 0.0 for client in answers if client[-1].outcome == COMPLETED]
    return {
        "clients_ask": patience,
        "clients": len(answers),
        "may_run": NUM_RANKS * MAX_NUM_SEQS,
        "may_wait": MAX_QUEUED,
        "max_tokens": max_tokens,
        "completed": last[COMPLETED],
        "refused": last[REFUSED],
        "lost": last[LOST],
        "altered": altered,
        "refusals": len(refusals),
        "without_retry_after": sum(answer.retry_after_s is None for answer in refusals),
        "longest_retry_after_s": max((answer.retry_after_s or 0.0 for answer in refusals), default=0.0),
        "ttft_p50_s": round(quantile(ttft_s, 0.5), 3) if ttft_s else None,
        "ttft_p99_s": round(quantile(ttft_s, 0.99), 3) if ttft_s else None,
        "wall_s": round(wall_s, 1),
        "first_error": next((answer.error for answer in everything if answer.outcome == LOST), None),
    }


def _targets(once: list[list[Answer]], rows: list[Row], idle: bool) -> list[Target]:
    def total(name: str) -> float:
        return sum(float(row[name] or 0) for row in rows)

    refused = sum(client[-1].outcome == REFUSED for client in once)
    patient = next(row for row in rows if row["clients_ask"] == "until served")
    return [
        Target("requests lost", total("lost"), at_most=0),
        Target("completed requests with other tokens than alone", total("altered"), at_most=0),
        Target("429 without Retry-After", total("without_retry_after"), at_most=0),
        Target("clients refused when all ask once", refused, at_least=1),
        Target("clients served in the end of those who come back", float(patient["completed"] or 0), NUM_CLIENTS),
        Target("engine idle and its KV blocks free at the end, 1 if so", float(idle), at_least=1),
    ]


def _idle(server: ServerProcess) -> bool:
    client = HttpClient(server.url)
    try:
        stats = client.stats()
    finally:
        client.close()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return all(stats[f"penstock:{name}"] == 0 for name in names)


if __name__ == "__main__":
    sys.exit(run("overload", measure))
