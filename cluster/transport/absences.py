"""Ranks that the others go on without, while other processes load what they held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...workers.plan import LayerCounts, RankResult
from ..engine.ranks import Replacement

_MOST_LOST = 5
"""Processes in a row that were to end an absence and did not come; then the next lost rank is waited for."""


@dataclass(slots=True)
class _Absence:
    loss: Replacement
    deadline_s: float
    """By when the process that takes its place is to have loaded."""
    has_loaded: bool = False


class Absences:
    """Which ranks are absent, and whose replacements have loaded."""

    def __init__(self) -> None:
        self._of_rank: dict[int, _Absence] = {}
        self._num_lost = 0
        """In a row, before one came."""

    def __contains__(self, rank: object) -> bool:
        return rank in self._of_rank

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._of_rank))

    def __len__(self) -> int:
        return len(self._of_rank)

    @property
    def may_begin(self) -> bool:
        """Whether another rank may be gone on without; not while replacements keep failing."""
        return self._num_lost < _MOST_LOST

    @property
    def returning(self) -> list[int]:
        """Ranks whose replacements have loaded, and wait to join the others."""
        return [rank for rank in self if self._of_rank[rank].has_loaded]

    def begin(self, loss: Replacement, deadline_s: float) -> None:
        """Go on without a rank whose replacement has been started."""
        self._of_rank[loss.rank] = _Absence(loss, deadline_s)

    def loaded(self, rank: int) -> None:
        """Take note that a rank's replacement has loaded."""
        self._of_rank[rank].has_loaded = True

    def end(self, rank: int) -> Replacement:
        """Have a returning rank back; return how it was lost."""
        self.came()
        return self._of_rank.pop(rank).loss

    def came(self) -> None:
        """Take note that a lost rank's replacement has come, waited for or not."""
        self._num_lost = 0

    def lose(self, rank: int) -> bool:
        """Take note that a rank's replacement is lost too; whether it was absent."""
        was_absent = self._of_rank.pop(rank, None) is not None
        self._num_lost += was_absent
        return was_absent

    def overdue(self, now_s: float) -> list[int]:
        """Return the ranks whose replacements should have loaded by ``now_s``."""
        return [rank for rank in self if not self._of_rank[rank].has_loaded and now_s > self._of_rank[rank].deadline_s]


def nothing_of(rank: int, other: RankResult) -> RankResult:
    """Return what an absent ``rank`` did in the step of which ``other`` is a present one's result."""
    zeros = [0] * len(other.counts.rows)
    counts = LayerCounts(zeros, zeros, zeros, zeros, zeros)
    return replace(
        other,
        rank=rank,
        token_ids=[],
        counts=counts,
        logprobs={},
        prompt_logprobs={},
        kept_weights={},
        thread_time_s=0.0,
    )
