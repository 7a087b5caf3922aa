"""Requests for simulated speculation: texts that are known beforehand, drafted as well as is wanted."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.cluster.speculation.options import SpeculationOptions


@dataclass
class Job:
    """One request: its whole text, and for scripted drafters how many tokens they get right after each position."""

    prompt: list[int]
    output: list[int]
    runs: Callable[[int], int] | None = None
    """By tokens of output so far; None where the drafter has nothing."""
    match_len: int = 3
    options: SpeculationOptions = field(default_factory=SpeculationOptions)


def bernoulli(
    seed: int, num_tokens: int, probability: Callable[[int], float], *, num_prompt: int = 32, none: float = 0.0
) -> Job:
    """A job whose drafts are right token by token with ``probability(tokens of output so far)``.

    ``none``: share of positions at which the drafter has nothing.
    """
    rng = random.Random(seed)
    text = [rng.randrange(1000) for _ in range(num_prompt + num_tokens)]
    hit = [rng.random() < probability(i) for i in range(num_tokens + 64)]
    silent = [rng.random() < none for _ in range(num_tokens + 64)]

    def runs(num_output: int) -> int:
        if silent[num_output]:
            return -1
        run = 0
        while num_output + run < len(hit) and hit[num_output + run]:
            run += 1
        return run

    return Job(text[:num_prompt], text[num_prompt:], runs)


@dataclass(frozen=True)
class Family:
    """Texts of one kind, made to be drafted by n-grams about as well as the demo model's answers of that name."""

    num_prompt: int
    num_tokens: int
    vocabulary: int
    copy: float
    """Share of positions at which a copy of earlier text begins."""
    run: float
    """Mean length of a copy."""

    def job(self, seed: int, num_tokens: int | None = None) -> Job:
        """Make one text."""
        rng = random.Random(seed)
        total = self.num_prompt + (num_tokens or self.num_tokens)
        text: list[int] = []
        while len(text) < total:
            if text and rng.random() < self.copy:
                start = rng.randrange(len(text))
                length = 1 + int(rng.expovariate(1 / self.run))
                for place in range(start, start + length):
                    text.append(text[place])
            else:
                # Few tokens are frequent, so short n-grams match by chance and mislead
                text.append(int(self.vocabulary * rng.random() ** 3))
        return Job(text[: self.num_prompt], text[self.num_prompt : total])


FAMILIES = {
    "code": Family(64, 256, 600, 0.5, 14.0),
    "math": Family(12, 96, 14, 0.02, 3.0),
    "extraction": Family(90, 96, 800, 0.3, 4.0),
    "chat": Family(40, 192, 400, 0.25, 8.0),
}


def jobs_of(curve: str, num_jobs: int, num_tokens: int, *, num_prompt: int = 32) -> list[Job]:
    """Make jobs whose drafts are right by a curve: a constant, drifting, flipping, silent or bimodal over requests."""
    curves: dict[str, Callable[[int, int], float]] = {
        "never": lambda job, i: 0.0,
        "seldom": lambda job, i: 0.2,
        "sometimes": lambda job, i: 0.4,
        "often": lambda job, i: 0.6,
        "mostly": lambda job, i: 0.8,
        "nearly always": lambda job, i: 0.95,
        "drifting": lambda job, i: 0.5 + 0.45 * math.sin(i / 25),
        "flipping fast": lambda job, i: 0.9 * (i // 16 % 2),
        "flipping": lambda job, i: 0.9 * (i // 48 % 2),
        "silent half the time": lambda job, i: 0.3,
        "bimodal": lambda job, i: 0.9 * (job % 2),
    }
    probability = curves[curve]
    none = 0.5 if curve == "silent half the time" else 0.0
    return [
        bernoulli(1000 + job, num_tokens, lambda i, job=job: probability(job, i), num_prompt=num_prompt, none=none)
        for job in range(num_jobs)
    ]
