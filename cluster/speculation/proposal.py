"""What a drafter proposes, and why it may be believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul


@dataclass(frozen=True, slots=True)
class Evidence:
    """What speaks for a proposal. Acceptance is learned per evidence, so it must be cheap and mean the same later."""

    source: str = ""
    """Name of the drafter."""
    match_len: int = 0
    """Tokens before the proposal that also stood before the text it was copied from."""
    frequencies: Sequence[float] = ()
    """Per proposed token, in [0, 1]: the share of earlier occurrences of the text before it that it followed.

    Smoothed, (agreeing + 1) / (all + 2), so that many occurrences count for more than one.
    """


@dataclass(frozen=True, slots=True)
class Proposal:
    """Guesses of the tokens that come next, in order; empty when there is none."""

    token_ids: Sequence[int] = ()
    evidence: Evidence = Evidence()

    def __len__(self) -> int:
        return len(self.token_ids)

    def reach(self, length: int) -> list[float]:
        """Return for ``length`` tokens the probability that each is reached and right, as far as the drafter can tell.

        Of a token whose frequency it does not know, it is sure.
        """
        frequencies = list(self.evidence.frequencies[:length])
        return list(accumulate([*frequencies, *[1.0] * (length - len(frequencies))], mul))


NOTHING = Proposal()
