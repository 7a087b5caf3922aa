from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.speculation.drafter import DraftContext, drafter_factory
from penstock.cluster.speculation.drafting import Drafting

NGRAM = drafter_factory("ngram")


def test_a_proposal_is_compared_with_the_text_as_it_comes() -> None:
    drafting = Drafting(NGRAM, 0, keep_trials=True)
    drafting.open(0, DraftContext(5))
    text = [1, 2, 3, 4, 1]
    proposal = drafting.propose(0, text, 3)
    assert list(proposal.token_ids) == [2, 3, 4]
    assert drafting.settle(0, text) == []
    [first] = drafting.settle(0, [*text, 2])
    assert (first.first, first.num_right, first.num_known) == (0, 1, 1)
    assert drafting.settle(0, [*text, 2]) == [], "known already"
    [second] = drafting.settle(0, [*text, 2, 3, 9])
    assert (second.first, second.num_right, second.num_known) == (1, 2, 3)
    assert second.evidence == proposal.evidence
    assert drafting.settle(0, [*text, 2, 3, 9, 4]) == [], "settled"


def test_a_step_planned_again_is_one_proposal() -> None:
    drafting = Drafting(NGRAM, 0, keep_trials=True)
    drafting.open(0, DraftContext(3))
    assert drafting.propose(0, [1, 2, 1], 2) == drafting.propose(0, [1, 2, 1], 2)
    assert len(drafting.settle(0, [1, 2, 1, 2])) == 1


@settings(max_examples=100, deadline=None)
@given(text=st.lists(st.integers(0, 2), min_size=3, max_size=40), strides=st.lists(st.integers(1, 4), min_size=40))
def test_trials_add_up_to_the_comparison_of_every_proposal(text: list[int], strides: list[int]) -> None:
    drafting = Drafting(NGRAM, 0, keep_trials=True)
    drafting.open(0, DraftContext(1))
    length, right, known, expected_right, expected_known = 1, 0, 0, 0, 0
    for stride in strides:
        if length >= len(text):
            break
        proposal = drafting.propose(0, text[:length], 5)
        following = text[length : length + len(proposal)]
        matched = 0
        while matched < len(following) and following[matched] == proposal.token_ids[matched]:
            matched += 1
        expected_right += matched
        expected_known += min(matched + 1, len(following))
        length = min(length + stride, len(text))
        for trial in drafting.settle(0, text[:length]):
            right += trial.num_right - trial.first
            known += trial.num_known - trial.first
    for trial in drafting.settle(0, text):
        right += trial.num_right - trial.first
        known += trial.num_known - trial.first
    assert (right, known) == (expected_right, expected_known)


def test_without_trials_nothing_is_kept_and_closed_requests_feed_the_store() -> None:
    drafting = Drafting(drafter_factory("suffix"), 100, keep_trials=False)
    for key in (0, 1, 2):
        drafting.open(key, DraftContext(2))
    assert drafting.settle(1, [7, 8]) == [], "never asked"
    drafting.propose(0, [1, 2, 30], 2)
    assert drafting.settle(0, [1, 2, 30, 31]) == []
    drafting.close(0, [1, 2, 30, 31, 32])
    proposal = drafting.propose(1, [5, 30], 2)
    assert (list(proposal.token_ids), proposal.evidence.source) == ([31, 32], "suffix_store")
    drafting.close(2, [1, 2, 40, 41])  # it never drafted: its output was never indexed, nor is it now
    assert not drafting.propose(1, [5, 30, 40], 2)
    drafting.close(1, [5, 30, 40])
    assert not drafting._contexts
    assert not drafting._sessions
