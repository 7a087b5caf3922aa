"""Suffix decoding: draft what most often followed the longest match in the request's text or in earlier outputs."""

from __future__ import annotations

from collections.abc import Sequence

from .output_store import OutputStore, StoreCursor
from .proposal import NOTHING, Evidence, Proposal
from .suffix_automaton import SuffixAutomaton

MIN_PROBABILITY = 0.02
"""A draft ends where its tokens' frequencies multiply to less: that text is not known well enough."""


class SuffixDrafter:
    """Follows the likeliest continuation of the longest match, in the own text or, if longer there, in the store.

    Source: SuffixDecoding (arXiv 2411.04975), with automata in place of trees.
    """

    def __init__(self, store: OutputStore) -> None:
        self._text = SuffixAutomaton()
        self._cursor = StoreCursor(store)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append to the text."""
        self._text.extend(token_ids)
        self._cursor.extend(token_ids)

    def propose(self, max_draft_len: int) -> Proposal:
        """Return the likeliest continuation, empty if even the last token is new."""
        text = self._text
        automaton, state = text, text.links[text.last]
        match_len, source = text.lengths[state] if state > 0 else 0, "suffix"
        stored = self._cursor.longest()
        if stored is not None and stored[2] > match_len:
            (automaton, state, match_len), source = stored, "suffix_store"
        if not match_len:
            return NOTHING
        tokens, frequencies = automaton.draft(state, max_draft_len, MIN_PROBABILITY)
        return Proposal(tokens, Evidence(source, match_len, frequencies)) if tokens else NOTHING
