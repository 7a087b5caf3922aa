"""What is served to compare speculation policies: the paper's seven mixes of three kinds of text, and chat.

Two kinds of request. *Answers*: greedy, ended by the model itself, short (the demo model's tasks). *Long*: about a
given number of tokens, sampled at temperature 0.8 and kept from ending: prompts of the same families, continued for as
long as such a request takes. Lengths vary by a quarter around that number: requests of one length would all be admitted
in the same steps as long as nothing is drafted, and in different ones as soon as something is. A workload has the same
number of tokens of each of its families.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import count, islice

from ..cluster.api.chat_tokenizer import ChatTokenizer
from ..demo import prompts
from ..demo.records import FAMILIES, Family, Record, generate
from ..workers.sampling_params import SamplingParams
from .recorded_ranks import Job

WORKLOADS: dict[str, tuple[Family, ...]] = {
    "code": ("code",),
    "math": ("math",),
    "extraction": ("extraction",),
    "code+math": ("code", "math"),
    "code+extraction": ("code", "extraction"),
    "math+extraction": ("math", "extraction"),
    "code+math+extraction": ("code", "math", "extraction"),
    "chat": ("chat",),
}
MIX = "code+math+extraction"
"""The workload over which one length, or one table of lengths, must do for all."""
TEMPERATURE = 0.8
SPREAD = 0.25
"""Lengths of long requests vary by this share to either side."""
GENERATED = 384
"""Prompts of each family that is generated."""
_NEVER = -100.0


class JobMaker:
    """Makes requests from held-out prompts, in an order and with seeds that ``seed`` decides."""

    def __init__(self, tokenizer: ChatTokenizer, eos_token_ids: Sequence[int], seed: int) -> None:
        self._eos_token_ids, self._seed = eos_token_ids, seed
        self._prompts: dict[str, list[tuple[int, ...]]] = {}
        for family in FAMILIES:
            texts = [tuple(tokenizer.encode_chat(record.chat())) for record in _records(family, seed)]
            random.Random(f"{seed} {family}").shuffle(texts)
            self._prompts[family] = texts

    def answer(self, family: str, number: int) -> Job | None:
        """Return a family's ``number``-th question, None behind the last."""
        if number >= len(self._prompts[family]):
            return None
        sampling = SamplingParams(temperature=0, max_tokens=512)
        return Job((family, number, "answer"), self._prompts[family][number], sampling)

    def long(self, family: str, number: int, num_tokens: int) -> Job:
        """Return a request of about ``num_tokens``; prompts come again, with other seeds, when all have been used."""
        texts = self._prompts[family]
        share = random.Random(f"{self._seed} {family} {number}").uniform(1 - SPREAD, 1 + SPREAD)
        sampling = SamplingParams(
            temperature=TEMPERATURE,
            seed=1000 * self._seed + number,
            max_tokens=round(share * num_tokens),
            ignore_eos=True,
            logit_bias=dict.fromkeys(self._eos_token_ids, _NEVER),
        )
        return Job((family, number, "long"), texts[number % len(texts)], sampling)

    def workload(
        self, families: Sequence[str], length: int | None, num_tokens: int, tokens_of: Callable[[Job], int]
    ) -> list[Job]:
        """Return requests of about ``num_tokens`` tokens in all, families in turns by tokens served.

        ``length``: tokens of each, None for answers; ``tokens_of``: how many tokens a request's output has.
        """
        served = dict.fromkeys(families, 0)
        numbers = {family: count() for family in families}
        jobs = []
        while sum(served.values()) < num_tokens:
            family = min(families, key=lambda name: served[name])
            number = next(numbers[family])
            job = self.answer(family, number) if length is None else self.long(family, number, length)
            if job is None:
                break
            jobs.append(job)
            served[family] += tokens_of(job)
        return jobs


def _records(family: Family, seed: int) -> Iterable[Record]:
    """Return what does not depend on the running Python: committed prompts, or generated ones where they are many."""
    if family in ("code", "chat"):
        return prompts.load(family)
    return islice(generate(family, "held_out", seed), GENERATED)
