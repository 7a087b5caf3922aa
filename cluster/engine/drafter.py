"""Drafters guess the tokens that come next; verification decides. They are registered by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ..config import EngineConfig


class Drafter(Protocol):
    """Drafts for one request. It may keep an index of the request's tokens, extended as they grow."""

    def propose(self, token_ids: Sequence[int], draft_len: int) -> list[int]:
        """Return at most ``draft_len`` (>= 1) guesses of what follows ``token_ids``; empty when it has none.

        ``token_ids`` only ever grows between calls for the same request.
        """
        ...


class NgramDrafter:
    """Prompt lookup: what followed the most recent earlier occurrence of the last n tokens, longest n first.

    Source: Saxena, "Prompt lookup decoding" (2023). The index is incremental: every token is indexed once, so a
    proposal costs O(prompt_lookup_max) whatever the context's length.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._sizes = range(config.prompt_lookup_max, config.prompt_lookup_min - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}
        """Where the text after each n-gram begins, for its latest occurrence that something follows."""
        self._num_indexed = 0

    def propose(self, token_ids: Sequence[int], draft_len: int) -> list[int]:
        """Return the tokens that followed the latest earlier match, repeated if the text ends first."""
        # An n-gram is indexed once a token follows it, so the last one never finds itself
        for end in range(max(self._num_indexed, 1), len(token_ids)):
            for size in self._sizes:
                if size <= end:
                    self._ends[tuple(token_ids[end - size : end])] = end
        self._num_indexed = max(len(token_ids), 1)
        for size in self._sizes:
            if size < len(token_ids):
                start = self._ends.get(tuple(token_ids[-size:]))
                if start is not None:
                    # Past the end of the text the draft itself follows, so a short period is drafted in full
                    source = list(token_ids[start : start + draft_len])
                    while len(source) < draft_len:
                        source += source[: draft_len - len(source)]
                    return source
        return []


_DRAFTERS: dict[str, Callable[[EngineConfig], Drafter]] = {"ngram": NgramDrafter}


def make_drafter(config: EngineConfig) -> Drafter:
    """Return a new drafter for one request; raise ``ValueError`` listing the valid names for an unknown one."""
    if config.drafter not in _DRAFTERS:
        raise ValueError(f"drafter: {config.drafter!r} is not one of {', '.join(sorted(_DRAFTERS))}")
    return _DRAFTERS[config.drafter](config)
