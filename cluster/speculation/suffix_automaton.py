"""An online suffix automaton that counts: which contexts occurred how often, and what followed them most."""

from __future__ import annotations

from collections.abc import Sequence

ROOT = 0
_CHAIN = 16
"""Contexts, longest first, whose counts one token updates: bounds its cost on periodic text, where every suffix is
a context of its own. The contexts beyond are shorter ones, which a draft from the longest match does not ask."""


class SuffixAutomaton:
    """All substrings of the texts it was fed, at most two states a token, in amortised constant time a token.

    A state stands for the contexts (substrings) that end at the same places; ``links[state]`` for the longest of
    their suffixes that ends at more places. Source: Blumer et al. (1985); suffix decoding: arXiv 2411.04975.
    """

    def __init__(self) -> None:
        self.lengths = [0]
        """Per state: length of its longest context."""
        self.links = [-1]
        self.transitions: list[dict[int, int]] = [{}]
        self.counts = [0]
        """Per state: how often its contexts have ended."""
        self.likeliest = [-1]
        """Per state: the token that followed it most often, the latest of several; -1 if none has."""
        self.last = ROOT
        """The state of the whole text since `begin_text`."""
        self.num_tokens = 0

    def begin_text(self) -> None:
        """Let the next token begin another text: no context reaches across."""
        self.last = ROOT

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token in token_ids:
            before = self.last
            self.last = self._state_after(before, token)
            self._count(before, token)
        self.num_tokens += len(token_ids)

    def _state_after(self, before: int, token: int) -> int:
        transitions, lengths = self.transitions, self.lengths
        if token in transitions[before]:  # only where a text begins like an earlier one
            return self._exact_target(before, token)
        state = self._new_state(lengths[before] + 1, {})
        context = before
        while context >= 0 and token not in transitions[context]:
            transitions[context][token] = state
            context = self.links[context]
        self.links[state] = ROOT if context < 0 else self._exact_target(context, token)
        return state

    def _exact_target(self, context: int, token: int) -> int:
        """Return the state of ``context``'s longest string and ``token``, split off its present one if need be."""
        target = self.transitions[context][token]
        length = self.lengths[context] + 1
        if self.lengths[target] == length:
            return target
        clone = self._new_state(length, dict(self.transitions[target]))
        self.links[clone], self.counts[clone] = self.links[target], self.counts[target]
        self.likeliest[clone] = self.likeliest[target]
        self.links[target] = clone
        while context >= 0 and self.transitions[context].get(token) == target:
            self.transitions[context][token] = clone
            context = self.links[context]
        return clone

    def _new_state(self, length: int, transitions: dict[int, int]) -> int:
        self.lengths.append(length)
        self.links.append(-1)
        self.transitions.append(transitions)
        self.counts.append(0)
        self.likeliest.append(-1)
        return len(self.lengths) - 1

    def _count(self, before: int, token: int) -> None:
        counts, links, likeliest, transitions = self.counts, self.links, self.likeliest, self.transitions
        state = self.last
        for _ in range(_CHAIN):
            if state == ROOT:
                break
            counts[state] += 1
            state = links[state]
        state = before
        for _ in range(_CHAIN):
            if state <= ROOT:
                break
            following = transitions[state]
            most = likeliest[state]
            if most < 0 or counts[following[token]] >= counts[following[most]]:
                likeliest[state] = token
            state = links[state]

    def draft(self, state: int, max_draft_len: int, min_probability: float) -> tuple[list[int], list[float]]:
        """Return what most often followed ``state``, token by token, and each token's smoothed frequency.

        Stops before the product of the frequencies falls under ``min_probability``.
        """
        tokens: list[int] = []
        frequencies: list[float] = []
        probability = 1.0
        while len(tokens) < max_draft_len:
            while state > ROOT and self.likeliest[state] < 0:  # nothing has followed it yet: what it ends with may know
                state = self.links[state]
            if state <= ROOT:
                break
            token = self.likeliest[state]
            following = self.transitions[state][token]
            # The end of the present text is an occurrence that nothing follows; a clone may not have counted all
            agreeing = self.counts[following]
            total = max(self.counts[state] - (not tokens), agreeing)
            frequency = (agreeing + 1) / (total + 2)
            probability *= frequency
            if probability < min_probability:
                break
            tokens.append(token)
            frequencies.append(frequency)
            state = following
        return tokens, frequencies
