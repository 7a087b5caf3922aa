"""Clients that stream one question after another, compare every token with what it should be, and time the pauses."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from .. import demo
from ..cluster.api.chat_tokenizer import ChatTokenizer
from ..demo import prompts
from ..demo.records import FAMILIES
from ..workers.sampling_params import SamplingParams
from .http_stream import COMPLETED, LOST, Answer, ask
from .ties import EXCUSED_GAP, gap

DEMO = Path(demo.__file__).parent / "model"
NAME = "demo"
MAX_TOKENS = 200
PAUSE_S = 0.5
"""Mean time between two questions of a client: two cores cannot serve all of them all the time."""
_AGAIN_S = 0.2
_PATIENCE_S = 180.0


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


def make_questions(number: int, rng: random.Random) -> list[Question]:
    """Return held-out chats of the demo, greedy and sampled in turn."""
    chats = [record.chat() for family in FAMILIES for record in prompts.load(family)]
    return [Question(chat, float(i % 2), rng.randrange(1 << 30)) for i, chat in enumerate(rng.sample(chats, number))]


async def answer_all(url: str, questions: Sequence[Question]) -> list[list[int]]:
    """Return the tokens of every answer, all asked at once; a server without faults completes each."""
    async with aiohttp.ClientSession() as session:
        answers: list[Answer] = await asyncio.gather(*[ask(session, url, question.body()) for question in questions])
    assert all(answer.outcome == COMPLETED for answer in answers), "without faults all are served"
    return [answer.token_ids for answer in answers]


@dataclass(slots=True)
class Tally:
    """What became of all streams."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[int, list[int]]] = field(default_factory=list)
    """(question, tokens) of streams that differ from what they should be."""
    errors: list[str] = field(default_factory=list)
    num_tokens: int = 0
    longest_pause_s: float = 0.0

    def judge(self, questions: Sequence[Question], wanted: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Return how many of the different answers are excused as ties, and how many tokens of the others are wrong."""
        tokenizer = ChatTokenizer(str(DEMO))
        excused = altered = 0
        for number, got in self.wrong:
            question, want = questions[number], wanted[number]
            first = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
            if first is None:  # a token is missing or comes twice
                altered += abs(len(got) - len(want))
                continue
            prompt = tokenizer.encode_chat(question.messages)
            sampling = SamplingParams(temperature=question.temperature, seed=question.seed)
            if gap(DEMO, [*prompt, *want[:first]], len(prompt), sampling) < EXCUSED_GAP:
                excused += 1
            else:
                altered += len(want) - first
        return excused, altered


@dataclass(frozen=True, slots=True)
class Pause:
    """Time between two signs of life of one stream; being sent is the first."""

    stream_sent_s: float
    began_s: float
    ended_s: float

    @property
    def length_s(self) -> float:
        """How long it was."""
        return self.ended_s - self.began_s


class StreamClient:
    """Asks one question after another until told to stop, and never sends one again unless it ``may_be_cut``."""

    def __init__(
        self, url: str, questions: Sequence[Question], wanted: Sequence[list[int]], tally: Tally, seed: int
    ) -> None:
        self._url, self._questions, self._wanted, self._tally = url, questions, wanted, tally
        self._random = random.Random(seed)
        self.pauses: list[Pause] = []
        """Of all streams, by the monotonic clock."""
        self.may_be_cut = False
        self.cut_s: float | None = None
        """When a stream was cut first, or could not be begun."""
        self.stopped = False

    async def run(self) -> None:
        """Ask."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_PATIENCE_S)) as session:
            while not self.stopped:
                await self._ask(session, self._random.randrange(len(self._questions)))
                await asyncio.sleep(self._random.uniform(0.0, 2 * PAUSE_S))

    async def _ask(self, session: aiohttp.ClientSession, number: int, cut: Pause | None = None) -> None:
        """Ask a question; ``cut``: the last pause of the stream that was cut, which this one takes the place of."""
        sent = cut.stream_sent_s if cut else time.monotonic()
        last = cut.ended_s if cut else sent

        async def take(_: int) -> bool:
            nonlocal last
            last, before = time.monotonic(), last
            self.pauses.append(Pause(sent, before, last))
            self._tally.longest_pause_s = max(self._tally.longest_pause_s, last - before)
            return True

        answer = await ask(session, self._url, self._questions[number].body(), take)
        wanted = self._wanted[number]
        self._tally.num_tokens += len(answer.token_ids)
        if answer.outcome == COMPLETED:
            same = answer.token_ids == wanted
            self._tally.outcomes["completed" if same else "different"] += 1
            if not same:
                self._tally.wrong.append((number, answer.token_ids))
        elif self.may_be_cut:
            # It is asked again, from the start
            self._tally.outcomes["cut" if answer.status == 200 else "nobody listens"] += 1
            assert answer.outcome == LOST
            if answer.token_ids != wanted[: len(answer.token_ids)]:
                self._tally.wrong.append((number, answer.token_ids))
            self.cut_s = self.cut_s or time.monotonic()
            await asyncio.sleep(_AGAIN_S)
            await self._ask(session, number, Pause(sent, last, last))
        else:
            self._tally.outcomes["lost"] += 1
            self._tally.errors.append(f"after {time.monotonic() - sent:.1f} s: {answer.error or answer.status}")
            await asyncio.sleep(_AGAIN_S)

    def streams_since(self, moment: float) -> bool:
        """Tell whether anything has come since."""
        return bool(self.pauses) and self.pauses[-1].ended_s > moment

    def pause_after(self, moment: float) -> float:
        """Return the longest pause that ended after ``moment``."""
        return max((pause.length_s for pause in self.pauses if pause.ended_s > moment), default=0.0)

    def was_streaming_at(self, moment: float) -> bool:
        """Tell whether a stream had brought something before ``moment`` and went on after it."""
        return any(pause.stream_sent_s < pause.began_s <= moment < pause.ended_s for pause in self.pauses)
