from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.drafter import NgramDrafter, make_drafter


def drafter(largest: int = 3, smallest: int = 1) -> NgramDrafter:
    return NgramDrafter(EngineConfig(model="m", prompt_lookup_max=largest, prompt_lookup_min=smallest))


def rescan(tokens: list[int], draft_len: int, largest: int, smallest: int) -> list[int]:
    """Prompt lookup from scratch: the longest suffix that occurs earlier, at its latest occurrence."""
    for size in range(largest, smallest - 1, -1):
        suffix = tokens[-size:]
        for start in range(len(tokens) - size - 1, -1, -1):
            if len(tokens) > size and tokens[start : start + size] == suffix:
                text, draft = list(tokens), []
                for ahead in range(draft_len):
                    # Beyond the text, what was drafted already is what follows
                    draft.append(text[start + size + ahead])
                    text.append(draft[-1])
                return draft
    return []


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    draft_len=st.integers(1, 12),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    data=st.data(),
)
def test_drafts_are_those_of_a_rescan(
    tokens: list[int], draft_len: int, sizes: tuple[int, int], data: st.DataObject
) -> None:
    largest, smallest = max(sizes), min(sizes)
    subject = drafter(largest, smallest)
    # It is asked at some lengths only, as a controller pleases, and sometimes twice at one (a step planned again)
    lengths = data.draw(st.lists(st.integers(1, len(tokens)), min_size=1, max_size=10).map(sorted))
    for length in lengths:
        text = tokens[:length]
        assert subject.propose(text, draft_len) == rescan(text, draft_len, largest, smallest)
        assert text == tokens[:length]


def test_the_longest_ngram_wins_over_a_later_shorter_one() -> None:
    tokens = [1, 2, 3, 8, 9, 5, 3, 7, 1, 2, 3]
    assert drafter(3, 1).propose(tokens, 2) == [8, 9]
    assert drafter(1, 1).propose(tokens, 2) == [7, 1]


def test_the_latest_match_wins() -> None:
    assert drafter(2, 1).propose([4, 5, 1, 4, 5, 2, 4, 5], 1) == [2]


def test_nothing_is_drafted_without_a_match_long_enough() -> None:
    assert drafter(3, 2).propose([1, 2, 3, 2], 4) == []
    assert drafter(3, 1).propose([1, 2, 3, 2], 2) == [3, 2]
    assert drafter().propose([1], 4) == []
    assert drafter().propose([1, 2], 4) == []


@pytest.mark.parametrize("period", [1, 2, 5])
def test_periodic_text_is_drafted_in_full(period: int) -> None:
    cycle = list(range(10, 10 + period))
    tokens = (cycle * 12)[: 3 * period + 4]
    expected = (cycle * 40)[len(tokens) :][:30]
    assert drafter().propose(tokens, 30) == expected


class _Counted(Sequence[int]):
    """A text that counts the tokens read from it."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.num_read = tokens, 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Any) -> Any:
        found = self.tokens[index]
        self.num_read += len(found) if isinstance(index, slice) else 1
        return found


def test_a_proposal_costs_the_same_however_long_the_text() -> None:
    rng = random.Random(1)
    subject, text = drafter(), _Counted([rng.randrange(1000) for _ in range(2000)])
    subject.propose(text, 4)
    first = text.num_read
    assert first <= 2000 * (1 + 2 + 3) + 20, "every token is indexed once per size"
    costs = []
    for _ in range(2000):
        text.tokens.append(rng.randrange(1000))
        text.num_read = 0
        subject.propose(text, 4)
        costs.append(text.num_read)
    assert max(costs) <= 20
    assert len(subject._ends) <= 3 * len(text)


def test_an_unknown_drafter_is_refused_with_the_valid_names() -> None:
    assert isinstance(make_drafter(EngineConfig(model="m")), NgramDrafter)
    with pytest.raises(ValueError, match=r"^drafter: 'oracle' is not one of .*ngram"):
        make_drafter(EngineConfig(model="m", drafter="oracle"))
