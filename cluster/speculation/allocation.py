"""Share one step's verification among requests: most tokens per second of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

MIN_GAIN = 0.02
"""A draft token reached and right less often than this is not considered: no step is that cheap."""


@dataclass(frozen=True, slots=True)
class Chain:
    """One request's drafted tokens: taking the n-th means taking those before it."""

    rank: int
    gains: Sequence[float]
    """Per token, falling: the probability that it is reached and right."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """How many tokens of each chain to verify, and what is expected of it."""

    draft_lens: list[int]
    num_tokens: float
    """Expected tokens of the step."""
    step_s: float


def allocate(
    chains: Sequence[Chain],
    base_rows: Sequence[int],
    num_tokens: float,
    step_s: Callable[[int, int], float],
    max_extra_s: float,
) -> Allocation:
    """Return the allocation with the best expected tokens per time; of equals, that with fewest rows.

    ``base_rows``: rows that each rank runs anyway; ``num_tokens``: tokens that those are expected to yield;
    ``step_s(num_rows, max_rows)``: expected time of a step by the rows of all ranks and of the rank with most;
    ``max_extra_s``: most time that the drafts may add to it.

    Tokens are added one by one, the best gain per further second first. A rank that is not the fullest adds rows
    without making the fullest wait. Every stage is compared, since time may grow by steps (a graph's row bucket) or
    more slowly the more experts are read already, so a stage may pay that those before it did not.
    """
    rows = list(base_rows)
    total = sum(rows)
    best_time = time = step_s(total, max(rows))
    limit = time + max_extra_s
    best_tokens = num_tokens
    queues = [_queue(chains, rank) for rank in range(len(rows))]
    taken: list[int] = []
    num_best = 0
    while any(queues):
        # Only two times are possible: the fullest rank gets the row, or another that does not make it wait
        fullest = max(rows)
        longer, same = step_s(total + 1, fullest + 1), step_s(total + 1, fullest)
        options = []
        for rank, queue in enumerate(queues):
            if queue:
                time_then = longer if rows[rank] == fullest else same
                options.append((queue[-1][0] / max(time_then - time, 1e-9 * time), rank, time_then))
        _, rank, time = max(options)
        gain, chain = queues[rank].pop()
        rows[rank] += 1
        total += 1
        num_tokens += gain
        taken.append(chain)
        if time <= limit and num_tokens * best_time > best_tokens * time * (1 + 1e-9):
            best_tokens, best_time, num_best = num_tokens, time, len(taken)
    draft_lens = [0] * len(chains)
    for chain in taken[:num_best]:
        draft_lens[chain] += 1
    return Allocation(draft_lens, best_tokens, best_time)


def _queue(chains: Sequence[Chain], rank: int) -> list[tuple[float, int]]:
    """Return (gain, chain) of a rank's tokens, best last; a stable sort keeps each chain's order."""
    queue = [
        (gain, index)
        for index, chain in enumerate(chains)
        if chain.rank == rank
        for gain in chain.gains
        if gain >= MIN_GAIN
    ]
    return sorted(queue, key=lambda token: token[0])
