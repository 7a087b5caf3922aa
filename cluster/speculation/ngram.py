"""Prompt lookup: draft what followed the last n tokens before."""

from __future__ import annotations

from collections.abc import Sequence

from .proposal import NOTHING, Evidence, Proposal

_CAP = 255
"""Occurrences counted per n-gram."""


class NgramDrafter:
    """What followed the most recent earlier occurrence of the last n tokens, longest n first.

    Source: Saxena, "Prompt lookup decoding" (2023). Every token is indexed once, so a proposal costs
    O(prompt_lookup_max) whatever the context's length.
    """

    def __init__(self, prompt_lookup_max: int, prompt_lookup_min: int) -> None:
        self._sizes = range(prompt_lookup_max, prompt_lookup_min - 1, -1)
        self._tokens: list[int] = []
        self._seen: dict[tuple[int, ...], tuple[int, int, int]] = {}
        """Per n-gram that something follows: where the text after its latest occurrence begins, how often in a row
        the same token followed, and how often any did."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append to the text."""
        tokens, seen = self._tokens, self._seen
        # An n-gram is indexed once a token follows it, so the last one never finds itself
        first = max(len(tokens), 1)
        tokens.extend(token_ids)
        for end in range(first, len(tokens)):
            for size in self._sizes:
                if size > end:
                    continue
                ngram = tuple(tokens[end - size : end])
                start, agreeing, total = seen.get(ngram, (end, 0, 0))
                agreeing = min(agreeing + 1, _CAP) if tokens[start] == tokens[end] else 1
                seen[ngram] = (end, agreeing, min(total + 1, _CAP))

    def propose(self, max_draft_len: int) -> Proposal:
        """Return the tokens that followed the latest earlier match, repeated if the text ends first."""
        tokens = self._tokens
        for size in self._sizes:
            if size >= len(tokens):
                continue
            found = self._seen.get(tuple(tokens[-size:]))
            if found is not None:
                start, agreeing, total = found
                # Past the end of the text the draft itself follows, so a short period is drafted in full
                draft = tokens[start : start + max_draft_len]
                while len(draft) < max_draft_len:
                    draft += draft[: max_draft_len - len(draft)]
                frequencies = ((agreeing + 1) / (total + 2),) * max_draft_len
                return Proposal(draft, Evidence("ngram", size, frequencies))
        return NOTHING
