from __future__ import annotations

import itertools
import random

import pytest

from penstock.cluster.speculation.allocation import MIN_GAIN, Allocation, Chain, allocate

UNBOUNDED = 1e9


def linear(fixed: float, per_row: float, per_max_row: float = 0.0):
    return lambda num_rows, max_rows, num_budgeted=0: fixed + per_row * num_rows + per_max_row * max_rows


def allocated(chains, base_rows, num_tokens, step_s, max_extra_s) -> Allocation:
    """Allocate without any budget."""
    (found,) = allocate(chains, base_rows, num_tokens, [step_s], max_extra_s)
    return found


def best_rate(chains, base_rows, num_tokens, step_s) -> float:
    """Try all lengths."""
    best = 0.0
    for lengths in itertools.product(*(range(len(chain.gains) + 1) for chain in chains)):
        rows = list(base_rows)
        for chain, length in zip(chains, lengths, strict=True):
            rows[chain.rank] += length
        tokens = num_tokens + sum(sum(c.gains[:n]) for c, n in zip(chains, lengths, strict=True))
        best = max(best, tokens / step_s(sum(rows), max(rows)))
    return best


def test_nothing_is_taken_where_nothing_pays() -> None:
    found = allocated([Chain(0, (0.5, 0.2))], [1], 1.0, linear(0, 1), UNBOUNDED)
    assert (found.draft_lens, found.num_tokens, found.step_s) == ([0], 1.0, 1)
    assert allocated([], [3], 3.0, linear(1, 1), UNBOUNDED).draft_lens == []


def test_everything_likely_enough_is_taken_where_rows_are_free() -> None:
    found = allocated([Chain(0, (0.5, 0.2, MIN_GAIN / 2)), Chain(0, (0.9,))], [2], 2.0, linear(1, 0), UNBOUNDED)
    assert found.draft_lens == [2, 1]
    assert found.num_tokens == pytest.approx(2 + 0.5 + 0.2 + 0.9)


def test_marginal_gain_is_weighed_against_the_rate() -> None:
    # One plain row takes 3: the rate is 1/3, and a row of 1 pays from a gain of 1/3 on
    found = allocated([Chain(0, (0.5, 0.3))], [1], 1.0, linear(2, 1), UNBOUNDED)
    assert found.draft_lens == [1]
    assert found.num_tokens / found.step_s == pytest.approx(1.5 / 4)


def test_a_rank_that_is_not_the_fullest_adds_rows_for_nothing() -> None:
    chains = [Chain(0, (0.5, 0.4)), Chain(1, (0.1, 0.09, 0.08, 0.05))]
    found = allocated(chains, [4, 2], 6.0, linear(1, 0, 1), UNBOUNDED)
    assert found.draft_lens == [0, 2]
    assert found.step_s == 5


def test_a_stage_may_pay_that_the_ones_before_it_did_not() -> None:
    # Graphs padded to 4 rows: the second row costs as much as the fourth
    found = allocated([Chain(0, (0.7, 0.6, 0.5))], [1], 1.0, lambda rows, most, _: 1.0 if rows < 2 else 2.0, UNBOUNDED)
    assert found.draft_lens == [3]


def test_no_more_time_is_added_than_allowed() -> None:
    chains = [Chain(0, (0.9, 0.8, 0.7, 0.6))]
    lengths = [allocated(chains, [1], 1.0, linear(10, 1), extra).draft_lens[0] for extra in (0.0, 0.5, 1.0, 2.5, 9.0)]
    assert lengths == [0, 0, 1, 2, 4]


@pytest.mark.parametrize("seed", range(40))
def test_it_is_close_to_the_best_of_all_allocations(seed: int) -> None:
    rng = random.Random(seed)
    num_ranks = rng.choice([1, 1, 2])
    chains = []
    for index in range(4):
        gains = sorted((rng.random() for _ in range(rng.randrange(4))), reverse=True)
        chains.append(Chain(index % num_ranks, gains))
    base_rows = [sum(chain.rank == rank for chain in chains) for rank in range(num_ranks)]
    exponent, per_max = rng.uniform(0.5, 1.0), rng.choice([0.0, 0.1])

    def step_s(num_rows: int, max_rows: int, num_budgeted: int = 0) -> float:
        return 1 + num_rows**exponent + per_max * max_rows

    found = allocated(chains, base_rows, 4.0, step_s, UNBOUNDED)
    rows = list(base_rows)
    for chain, length in zip(chains, found.draft_lens, strict=True):
        rows[chain.rank] += length
        assert length <= len(chain.gains)
    assert found.step_s == pytest.approx(step_s(sum(rows), max(rows)))
    assert found.num_tokens / found.step_s >= 0.995 * best_rate(chains, base_rows, 4.0, step_s)
