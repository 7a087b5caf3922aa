"""OpenAI's predicted outputs: draft the text that the client expects."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

from .proposal import NOTHING, Evidence, Proposal

PREDICTION: Final = "prediction"
"""`Evidence.source` of what comes from a request's `prediction`."""
_SYNC_SIZES: Final = (3, 2)
"""Tokens of output that find their place again after a divergence, longest first."""
_SYNC_WINDOW: Final = 8
"""How far ahead of a divergence one token alone may find its place: most edits are short."""


class PredictionDrafter:
    """Follows the output along ``prediction``; after a divergence it looks for its place again.

    The place is where the last tokens of the output stand in the prediction, ahead of the divergence and nearest to
    it if possible. A draft is what follows in the prediction, so it ends where the prediction does.
    """

    def __init__(self, prediction: Sequence[int], num_prompt_tokens: int) -> None:
        self._prediction = list(prediction)
        self._num_prompt_tokens_left = num_prompt_tokens
        self._ends: dict[tuple[int, ...], list[int]] = {}
        for size in _SYNC_SIZES:
            for end in range(size, len(self._prediction) + 1):
                self._ends.setdefault(tuple(self._prediction[end - size : end]), []).append(end)
        self._place = 0
        """What is expected next, in the prediction; while lost, where it diverged."""
        self._match_len: int | None = 0
        """Tokens that agreed since the place was found; None while it is lost."""
        self._recent: list[int] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append to the text; the prompt passes unread."""
        skipped = min(self._num_prompt_tokens_left, len(token_ids))
        self._num_prompt_tokens_left -= skipped
        for token in token_ids[skipped:]:
            self._recent = [*self._recent[1 - max(_SYNC_SIZES) :], token]
            if self._match_len is not None and self._prediction[self._place : self._place + 1] == [token]:
                self._place += 1
                self._match_len += 1
            else:
                self._match_len = None
                self._find_place()

    def propose(self, max_draft_len: int) -> Proposal:
        """Return what the prediction says next; nothing while the place is lost, and inside the prompt."""
        if self._match_len is None or self._num_prompt_tokens_left:
            return NOTHING
        tokens = self._prediction[self._place : self._place + max_draft_len]
        return Proposal(tokens, Evidence(PREDICTION, self._match_len)) if tokens else NOTHING

    def _find_place(self) -> None:
        for size in _SYNC_SIZES:
            ends = self._ends.get(tuple(self._recent[-size:]), []) if len(self._recent) >= size else []
            if ends:
                # The first ahead of the divergence, or the last behind it
                self._settle(ends[min(bisect_right(ends, self._place), len(ends) - 1)], size)
                return
        window = self._prediction[self._place : self._place + _SYNC_WINDOW]
        if self._recent[-1] in window:
            self._settle(self._place + window.index(self._recent[-1]) + 1, 1)

    def _settle(self, place: int, match_len: int) -> None:
        self._place, self._match_len = place, match_len
