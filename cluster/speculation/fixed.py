"""The same draft length always; with length 0, no speculation."""

from __future__ import annotations

from collections.abc import Sequence

from .batch import Batch
from .controller import RequestReport
from .observation import ShadowTrial, StepObservation
from .proposal import Proposal


class FixedController:
    """Every request drafts ``draft_len`` tokens in every step, or fewer where its own limit is lower.

    With 0 no drafter is called for any request, whatever its own wish.
    """

    wants_trials = False

    def __init__(self, draft_len: int) -> None:
        self._draft_len = draft_len

    def rests(self, batch: Batch) -> bool:
        """Whether there is nothing to draft: with length 0, and where no request may."""
        return not self._draft_len or not batch.may_draft

    def max_draft_lens(self, batch: Batch) -> list[int]:
        """Return the configured length, within each request's limit."""
        if not self._draft_len:
            return [0] * len(batch.requests)
        return [
            request.max_draft_len if request.is_fixed else min(self._draft_len, request.max_draft_len)
            for request in batch.requests
        ]

    def draft_lens(self, batch: Batch, proposals: Sequence[Proposal]) -> list[int]:
        """Return the lengths of the proposals: all of them are verified."""
        return [len(proposal) for proposal in proposals]

    def budget_level(self) -> int:
        """Return the most lenient level: nothing is learned of budgets."""
        return 0

    def reach(self, key: int, proposal: Proposal, length: int) -> list[float]:
        """Return what the drafter's evidence says: nothing is learned here."""
        return proposal.reach(length)

    def observe(self, step: StepObservation) -> None:
        """Nothing is learned."""

    def learn(self, trials: Sequence[ShadowTrial]) -> None:
        """Nothing is left to learn."""

    def forget(self, key: int) -> None:
        """Nothing is kept."""

    def report(self, key: int) -> RequestReport:
        """Return the configured length."""
        return RequestReport("fixed" if self._draft_len else "off", self._draft_len)
