from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from math import prod
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.speculation.drafter import DraftContext, DrafterChain, drafter_factory
from penstock.cluster.speculation.ngram import NgramDrafter
from penstock.cluster.speculation.output_store import OutputStore, StoreCursor
from penstock.cluster.speculation.prediction import PredictionDrafter
from penstock.cluster.speculation.proposal import Proposal
from penstock.cluster.speculation.suffix import MIN_PROBABILITY, SuffixDrafter
from penstock.cluster.speculation.suffix_automaton import ROOT, SuffixAutomaton

from .simulated_jobs import FAMILIES

TEXT = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def occurrences(texts: Sequence[Sequence[int]], context: Sequence[int]) -> list[tuple[int, int]]:
    """Where ``context`` ends, as (text, end)."""
    size, wanted = len(context), list(context)
    return [
        (number, end)
        for number, text in enumerate(texts)
        for end in range(size, len(text) + 1)
        if list(text[end - size : end]) == wanted
    ]


def state_of(automaton: SuffixAutomaton, context: Sequence[int]) -> int | None:
    state: int | None = ROOT
    for token in context:
        state = automaton.transitions[state].get(token) if state is not None else None
    return state


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=3), probe=st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_it_accepts_exactly_the_substrings(texts: list[list[int]], probe: list[int]) -> None:
    automaton = SuffixAutomaton()
    for text in texts:
        automaton.begin_text()
        automaton.extend(text)
        for start in range(len(text)):
            assert state_of(automaton, text[start : start + 6]) is not None
    assert (state_of(automaton, probe) is not None) == bool(occurrences(texts, probe))
    assert len(automaton.lengths) <= 2 * sum(map(len, texts)) + 1
    for state in range(1, len(automaton.lengths)):
        assert automaton.lengths[automaton.links[state]] < automaton.lengths[state]


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_the_match_is_the_longest_suffix_that_occurred_before(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    automaton.extend(text)
    longest = max(size for size in range(len(text)) if not size or len(occurrences([text], text[-size:])) > 1)
    assert automaton.lengths[automaton.links[automaton.last]] == longest


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30), min_size=1, max_size=3))
def test_counts_and_likeliest_tokens_are_those_of_the_texts(texts: list[list[int]]) -> None:
    automaton = SuffixAutomaton()
    for text in texts:
        automaton.begin_text()
        automaton.extend(text)
    for text in texts:
        for end in range(1, len(text) + 1):
            for start in range(max(0, end - 5), end):
                context = text[start:end]
                state = state_of(automaton, context)
                assert state is not None
                ends = occurrences(texts, context)
                assert automaton.counts[state] <= len(ends)
                followers = [texts[number][place] for number, place in ends if place < len(texts[number])]
                if followers:
                    assert automaton.likeliest[state] in followers
                if max(map(len, texts)) <= 16:  # no chain of contexts is longer than what is counted
                    assert automaton.counts[state] == len(ends)
                    if followers:
                        most = max(map(followers.count, followers))
                        assert followers.count(automaton.likeliest[state]) == most


def suffix_drafter(*outputs: Sequence[int], capacity_tokens: int = 1000) -> SuffixDrafter:
    store = OutputStore(capacity_tokens)
    for output in outputs:
        store.add(output)
    return SuffixDrafter(store)


def propose(drafter: Any, text: Sequence[int], max_draft_len: int = 4) -> Proposal:
    drafter.extend(text)
    return drafter.propose(max_draft_len)


def test_the_most_frequent_continuation_of_the_longest_match_is_drafted() -> None:
    drafter = suffix_drafter()
    proposal = propose(drafter, [1, 2, 7, 0, 1, 2, 8, 0, 1, 2, 7, 5, 9, 1, 2], 2)
    assert proposal.token_ids[0] == 7, "twice, against once and later"
    assert proposal.evidence.source == "suffix"
    assert proposal.evidence.match_len == 2
    assert proposal.evidence.frequencies[0] == pytest.approx((2 + 1) / (3 + 2))


def test_an_uncertain_draft_ends_early() -> None:
    rng = random.Random(1)
    text = [rng.randrange(12) for _ in range(400)]
    known, unknown = propose(suffix_drafter(), [*text, *text[:20]], 7), propose(suffix_drafter(), [*text, 40, 1], 7)
    assert list(known.token_ids) == text[20:27]
    assert 1 <= len(unknown) < 5
    assert prod(unknown.evidence.frequencies) >= MIN_PROBABILITY


def test_nothing_is_drafted_after_a_new_token() -> None:
    assert not propose(suffix_drafter(), [1, 2, 3])
    assert not propose(suffix_drafter([7, 8]), [1, 2, 3])


def test_earlier_outputs_are_drafted_where_they_match_longer() -> None:
    stored = suffix_drafter([5, 6, 7, 8, 9])
    proposal = propose(stored, [6, 0, 5, 6])
    assert (list(proposal.token_ids), proposal.evidence.source, proposal.evidence.match_len) == (
        [7, 8, 9], "suffix_store", 2,
    )  # fmt: skip
    own = propose(suffix_drafter([5, 6, 7]), [5, 6, 1, 5, 6])
    assert (own.token_ids[0], own.evidence.source) == (1, "suffix"), "the own text wins at equal length"


@settings(max_examples=150, deadline=None)
@given(
    chunks=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=6),
    outputs=st.lists(TEXT, min_size=1, max_size=6),
)
def test_a_cursor_finds_true_matches_while_the_store_changes(chunks: list[list[int]], outputs: list[list[int]]) -> None:
    store = OutputStore(60)
    cursor, text, added = StoreCursor(store), [], []
    for index, chunk in enumerate(chunks):
        if index < len(outputs):
            store.add(outputs[index])
            added.append(outputs[index][-30:])
        text += chunk
        cursor.extend(chunk)
        found = cursor.longest()
        if found is not None:
            automaton, state, length = found
            assert occurrences(added, text[-length:])
            assert automaton.lengths[automaton.links[state]] < length <= automaton.lengths[state]
        elif index == 0:
            assert not occurrences(added, text[-1:])
    assert store.num_tokens <= 60


def test_the_store_forgets_the_oldest_outputs() -> None:
    store = OutputStore(20)
    for first in range(0, 100, 10):
        store.add(range(first, first + 10))
    assert store.num_tokens == 20
    assert not propose(SuffixDrafter(store), [0, 1])
    assert list(propose(SuffixDrafter(store), [90, 91], 2).token_ids) == [92, 93]
    nothing = OutputStore(0)
    nothing.add([1, 2, 3])
    assert nothing.num_tokens == 0


@pytest.mark.parametrize("edit", [[], [99], [99, 98, 97]])
def test_a_prediction_is_followed_and_found_again(edit: list[int]) -> None:
    prediction = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
    drafter = PredictionDrafter(prediction, num_prompt_tokens=2)
    assert not propose(drafter, [13], 3), "the prompt is not over"
    assert list(propose(drafter, [14], 3).token_ids) == [10, 11, 12]
    drafter.extend([10, 11, 12])
    assert drafter.propose(2).evidence.match_len == 3
    # tokens 13 and 14 are replaced by the edit
    drafter.extend(edit)
    if edit:
        assert not drafter.propose(3)
    drafter.extend([15, 16])
    assert list(drafter.propose(9).token_ids) == [17, 18, 19], "a draft ends with the prediction"
    drafter.extend([17, 18, 19])
    assert not drafter.propose(3)


def test_a_prediction_is_searched_ahead_of_the_divergence_first() -> None:
    prediction = [1, 2, 3, 7, 1, 2, 4, 8, 1, 2, 5]
    drafter = PredictionDrafter(prediction, num_prompt_tokens=0)
    drafter.extend([1, 2, 3, 7, 60, 61, 1, 2])
    assert list(drafter.propose(2).token_ids) == [4, 8]


def test_a_prediction_is_heard_before_the_drafter_of_the_server() -> None:
    store = OutputStore(0)
    context = DraftContext(num_prompt_tokens=3, prediction=[7, 8, 9])
    for name, kind in (("ngram", DrafterChain), ("suffix", DrafterChain), ("prediction", PredictionDrafter)):
        drafter = drafter_factory(name)(context, store)
        assert isinstance(drafter, kind)
        assert propose(drafter, [1, 2, 1], 3).evidence.source == "prediction"
    chain = drafter_factory("ngram")(context, store)
    assert propose(chain, [1, 2, 1, 2], 3).evidence.source == "ngram", "the output has left the prediction"
    assert isinstance(drafter_factory("ngram")(DraftContext(3), store), NgramDrafter)
    with pytest.raises(ValueError, match=r"^drafter: 'oracle' is not one of ngram, prediction, suffix$"):
        drafter_factory("oracle")


def count_lines(work: Callable[[], object]) -> int:
    """Lines of Python that ``work`` runs: a measure of effort that no busy machine disturbs."""
    lines = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


LONG_TEXTS = {
    "code": FAMILIES["code"].job(1, 8200).output,
    "periodic": [1, 2, 3] * 2800,
    "constant": [7] * 8200,
    "new": list(range(8200)),
}


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
@pytest.mark.parametrize("name", ["ngram", "suffix", "prediction"])
def test_a_step_costs_the_same_however_long_the_text(name: str, text: list[int]) -> None:
    store = OutputStore(4096)
    store.add(LONG_TEXTS["code"][:2000])
    drafter = drafter_factory(name)(DraftContext(100, text[:2000] if name == "prediction" else ()), store)

    def step(start: int) -> None:
        drafter.extend(text[start : start + 3])
        drafter.propose(7)

    drafter.extend(text[:100])
    early = [count_lines(lambda start=start: step(start)) for start in range(100, 190, 3)]
    drafter.extend(text[190:8000])
    late = [count_lines(lambda start=start: step(start)) for start in range(8000, 8180, 3)]
    # Lines of Python for three tokens and a proposal; a scan of the text would take thousands
    assert max(late) <= 900
    assert sum(late) <= 1.5 * max(early) * len(late)
