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
    keeps_to_budget: bool = False
    """Whether its request's rows keep to the step's budget of experts, if it has one, once a token is taken."""


StepPrice = Callable[[int, int, int], float]
"""Expected time of a step by the rows of all ranks, of the rank with most, and those that keep to a budget."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """How many tokens of each chain to verify, and what is expected of it."""

    draft_lens: list[int]
    num_tokens: float
    """Expected tokens of the step."""
    step_s: float

    @property
    def rate(self) -> float:
        """Expected tokens per second."""
        return self.num_tokens / self.step_s


def allocate(
    chains: Sequence[Chain],
    base_rows: Sequence[int],
    num_tokens: float,
    prices: Sequence[StepPrice],
    max_extra_s: float,
    num_budgeted: int = 0,
) -> list[Allocation]:
    """Return for each of ``prices`` the allocation with the best expected tokens per time; of equals, with fewest rows.

    ``base_rows``: rows that each rank runs anyway, ``num_budgeted`` of which keep to a budget; ``num_tokens``: tokens
    that those are expected to yield; ``prices``: the step without a budget, then under each; ``max_extra_s``: most time
    that the drafts may add to what the first price says of the step without them.

    Tokens are added one by one, by the first price the best gain per further second first. A rank that is not the
    fullest adds rows without making the fullest wait. Every stage is compared, since time may grow by steps (a graph's
    row bucket) or more slowly the more experts are read already, so a stage may pay that those before it did not.
    """
    rows, total, price = list(base_rows), sum(base_rows), prices[0]
    time = price(total, max(rows), num_budgeted)
    limit = time + max_extra_s
    queues = [_queue(chains, rank) for rank in range(len(rows))]
    taken: list[int] = []
    begun = [False] * len(chains)
    best = [_Best(under, num_tokens, under(total, max(rows), num_budgeted)) for under in prices]
    while any(queues):
        # Only two times are possible: the fullest rank gets the row, or another that does not make it wait
        fullest = max(rows)
        longer = price(total + 1, fullest + 1, 0)
        same = longer if len(rows) == 1 else price(total + 1, fullest, 0)
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
        if chains[chain].keeps_to_budget:
            num_budgeted += 1 if begun[chain] else 2  # its last token keeps to it as well
            begun[chain] = True
        taken.append(chain)
        best[0].compare(num_tokens, time, limit, len(taken))
        for found in best[1:]:
            found.compare(num_tokens, found.price(total, max(rows), num_budgeted), limit, len(taken))
    return [found.allocation(len(chains), taken) for found in best]


class _Best:
    """The best stage so far under one price."""

    __slots__ = ("num_taken", "num_tokens", "price", "time")

    def __init__(self, price: StepPrice, num_tokens: float, time: float) -> None:
        self.price, self.num_tokens, self.time, self.num_taken = price, num_tokens, time, 0

    def compare(self, num_tokens: float, time: float, limit: float, num_taken: int) -> None:
        if time <= limit and num_tokens * self.time > self.num_tokens * time * (1 + 1e-9):
            self.num_tokens, self.time, self.num_taken = num_tokens, time, num_taken

    def allocation(self, num_chains: int, taken: Sequence[int]) -> Allocation:
        draft_lens = [0] * num_chains
        for chain in taken[: self.num_taken]:
            draft_lens[chain] += 1
        return Allocation(draft_lens, self.num_tokens, self.time)


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
