"""Earlier outputs, shared between requests: what one answer said, the next may say again."""

from __future__ import annotations

from collections.abc import Sequence

from .suffix_automaton import ROOT, SuffixAutomaton

_LOOK_BACK = 64
"""Tokens of a request matched against the store: no evidence needs a longer match."""


class OutputStore:
    """The latest outputs, at most ``capacity_tokens`` of them, in two automata: the elder is dropped when the younger
    holds half of the capacity, since nothing can be taken out of an automaton.
    """

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity_tokens = capacity_tokens
        self.automata = [SuffixAutomaton()]
        """The younger first."""

    @property
    def num_tokens(self) -> int:
        """Tokens stored."""
        return sum(automaton.num_tokens for automaton in self.automata)

    def add(self, token_ids: Sequence[int]) -> None:
        """Store one output, at most half of the capacity of it, its end."""
        half = self._capacity_tokens // 2
        kept = token_ids[-half:] if half else ()
        if not kept:
            return
        if self.automata[0].num_tokens + len(kept) > half:
            self.automata = [SuffixAutomaton(), self.automata[0]]
        self.automata[0].begin_text()
        self.automata[0].extend(kept)


class StoreCursor:
    """Where the end of one growing text was found in a store."""

    def __init__(self, store: OutputStore) -> None:
        self._store = store
        self._matches: list[tuple[SuffixAutomaton, int, int]] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append to the text."""
        known = {id(automaton): (state, length) for automaton, state, length in self._matches}
        self._matches = [
            (automaton, *_follow(automaton, *known.get(id(automaton), (ROOT, 0)), token_ids[-_LOOK_BACK:]))
            for automaton in self._store.automata
        ]

    def longest(self) -> tuple[SuffixAutomaton, int, int] | None:
        """Return (automaton, state, match length) of the longest match, the younger of equals; None without one."""
        best = max(self._matches, key=lambda match: match[2], default=None)
        return best if best is not None and best[2] else None


def _follow(automaton: SuffixAutomaton, state: int, length: int, token_ids: Sequence[int]) -> tuple[int, int]:
    """Return the state and length of the longest match after more tokens."""
    links, lengths, transitions = automaton.links, automaton.lengths, automaton.transitions
    for token in token_ids:
        state = _settle(automaton, state, length)
        while state != ROOT and token not in transitions[state]:
            state = links[state]
            length = lengths[state]
        following = transitions[state].get(token)
        state, length = (ROOT, 0) if following is None else (following, length + 1)
    return _settle(automaton, state, length), length


def _settle(automaton: SuffixAutomaton, state: int, length: int) -> int:
    """Return the state that now stands for the match: the automaton may have split ``state`` since."""
    while state != ROOT and automaton.lengths[automaton.links[state]] >= length:
        state = automaton.links[state]
    return state
