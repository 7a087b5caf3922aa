"""Two answers to each of many questions, one by either of two models: how many more does the first get right?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959964
"""Of a two-sided interval at 95 %."""


@dataclass(frozen=True, slots=True)
class PairedMatches:
    """How often both, either or neither was right."""

    num_pairs: int
    num_reference_right: int
    num_lost: int
    """Pairs that only the reference got right."""
    num_gained: int
    """Pairs that only the other got right."""

    @property
    def reference_share(self) -> float:
        """Share of the pairs that the reference got right."""
        return self.num_reference_right / self.num_pairs

    @property
    def share(self) -> float:
        """Share of the pairs that the other got right."""
        return self.reference_share - self.loss

    @property
    def loss(self) -> float:
        """What the other loses of exact match, as a share of all pairs; negative if it gains."""
        return (self.num_lost - self.num_gained) / self.num_pairs

    @property
    def interval(self) -> tuple[float, float]:
        """Of ``loss`` at 95 %: Wald's with half a pair more in each of the four cells.

        Agresti and Min, Statistics in Medicine 24 (2005): it keeps its level also where nothing or little is lost.
        """
        num_pairs, lost, gained = self.num_pairs + 2, self.num_lost + 0.5, self.num_gained + 0.5
        middle = (lost - gained) / num_pairs
        spread = _Z * math.sqrt(lost + gained - (lost - gained) ** 2 / num_pairs) / num_pairs
        return middle - spread, middle + spread


def paired_matches(reference: Sequence[str], other: Sequence[str], answers: Sequence[str]) -> PairedMatches:
    """Compare two lists of texts with the right ``answers``; white space around them does not count.

    Raises ``ValueError`` unless there are as many of each, and some.
    """
    if not len(reference) == len(other) == len(answers) > 0:
        raise ValueError(f"paired: expected as many of each, got {len(reference)}, {len(other)} and {len(answers)}")
    wanted = [answer.strip() for answer in answers]
    first = [text.strip() == answer for text, answer in zip(reference, wanted, strict=True)]
    second = [text.strip() == answer for text, answer in zip(other, wanted, strict=True)]
    pairs = list(zip(first, second, strict=True))
    return PairedMatches(len(pairs), sum(first), pairs.count((True, False)), pairs.count((False, True)))
