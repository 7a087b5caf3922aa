from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.speculation.ngram import NgramDrafter


def rescan(tokens: list[int], draft_len: int, largest: int, smallest: int) -> tuple[list[int], int]:
    """Prompt lookup from scratch: the longest suffix that occurs earlier, at its latest occurrence, and its length."""
    for size in range(largest, smallest - 1, -1):
        suffix = tokens[-size:]
        for start in range(len(tokens) - size - 1, -1, -1):
            if len(tokens) > size and tokens[start : start + size] == suffix:
                text, draft = list(tokens), []
                for ahead in range(draft_len):
                    # Beyond the text, what was drafted already is what follows
                    draft.append(text[start + size + ahead])
                    text.append(draft[-1])
                return draft, size
    return [], 0


@settings(max_examples=300, deadline=None)
@given(
    chunks=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=6),
    draft_len=st.integers(1, 12),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_drafts_are_those_of_a_rescan(chunks: list[list[int]], draft_len: int, sizes: tuple[int, int]) -> None:
    subject, text = NgramDrafter(max(sizes), min(sizes)), []
    for chunk in chunks:
        subject.extend(chunk)
        text += chunk
        draft, match_len = rescan(text, draft_len, max(sizes), min(sizes))
        for _ in range(2):  # a proposal changes nothing
            proposal = subject.propose(draft_len)
            assert list(proposal.token_ids) == draft
            assert proposal.evidence.match_len == match_len
            assert len(proposal.evidence.frequencies) == len(draft)


@pytest.mark.parametrize(
    ("text", "agreeing", "total"),
    [
        ([1, 5, 1], 1, 1),
        ([1, 5, 1, 5, 1], 2, 2),
        ([1, 5, 1, 6, 1], 1, 2),
        ([1, 6, 1, 5, 1, 5, 1], 2, 3),
    ],
)
def test_frequency_counts_how_often_in_a_row_the_token_followed(text: list[int], agreeing: int, total: int) -> None:
    subject = NgramDrafter(1, 1)
    subject.extend(text)
    assert subject.propose(1).evidence.frequencies[0] == pytest.approx((agreeing + 1) / (total + 2))
