"""The requests of one step as a controller sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .prediction import PREDICTION
from .proposal import Proposal


@dataclass(frozen=True, slots=True)
class RequestView:
    """One decoding request: its last token awaits a row, and drafts may follow it."""

    key: int
    """The engine's own number for it."""
    rank: int
    context_len: int
    """Tokens of prompt and output so far."""
    max_draft_len: int
    """Most tokens it may draft in this step (`SpeculationOptions.limit`); 0 calls no drafter."""
    is_fixed: bool = False
    """It drafts ``max_draft_len`` tokens whatever the controller would choose, and teaches it no length."""
    allows_budget: bool = True
    """Whether its verifications may keep to a budget of experts."""

    def keeps_to_budget(self, proposal: Proposal) -> bool:
        """Return whether a verification of ``proposal`` keeps to the step's budget, if it has one.

        Drafts from the request's own prediction do not: no budget was calibrated with such.
        """
        return self.allows_budget and proposal.evidence.source != PREDICTION


@dataclass(frozen=True, slots=True)
class Batch:
    """One step over all ranks, before drafts: the coordinator plans for every rank at once."""

    requests: Sequence[RequestView]
    num_ranks: int = 1
    """Ranks that run in lock-step."""
    prompt_rows: Sequence[int] = ()
    """Rows of prompts that each rank is also expected to compute; empty where no rank has any."""
    is_sent: bool = False
    """Its step has been sent already, and verifies no drafts."""

    @property
    def may_draft(self) -> bool:
        """Whether any request's own limit leaves room for a draft."""
        return any(request.max_draft_len > 0 for request in self.requests)

    @property
    def has_prefill(self) -> bool:
        """Whether any rank is also expected to compute part of a prompt."""
        return any(self.prompt_rows)
