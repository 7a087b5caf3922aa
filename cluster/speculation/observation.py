"""What one committed step taught."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .proposal import Evidence


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """What became of one decoding request's drafts."""

    key: int
    num_drafted: int
    """Draft tokens verified; 0 is plain decoding, also when the drafter had nothing to propose."""
    num_accepted: int
    num_tokens: int
    """Tokens it got: the accepted drafts and one more, less what a stop cut off."""


@dataclass(frozen=True, slots=True)
class ShadowTrial:
    """A proposal compared with the text that followed, as far as it has: verified, shortened or ignored, no matter.

    Trials of one proposal continue each other: its tokens before ``first`` were right and have been told of.
    """

    key: int
    evidence: Evidence
    first: int
    num_right: int
    """Leading tokens of the proposal that the text repeated."""
    num_known: int
    """Tokens of the proposal whose fate is known: ``num_right``, and one more if that one was wrong."""


@dataclass(frozen=True, slots=True)
class StepObservation:
    """One committed step: its time from drafting to commit, and the ranks' exact counts."""

    step_s: float
    requests: Sequence[RequestOutcome]
    """The decoding requests of the step, on all ranks."""
    rows: Sequence[int]
    """Rows that each rank ran, prompt rows included; its length is the number of ranks."""
    has_prefill: bool
    """Whether any rank also computed part of a prompt."""
    experts: Sequence[float]
    """Distinct experts that each rank computed, a mean over MoE layers."""
    rows_sent: Sequence[float]
    """Rows that each rank sent to others, a row counting once per rank it visits; a mean over MoE layers."""
    budget_level: int | None = None
    """Index of the budget of experts that rows of the step kept to; None if none did."""
    num_budgeted_rows: int = 0
    """Rows of the requests, on all ranks, that kept to it."""
    waited_s: float | None = None
    """How long ranks had nothing to do between the results of the step before and of this one: messages and, unless it
    was sent ahead, planning; None where no step was right before, and where steps are never sent ahead."""
    was_ahead: bool = False
    """Whether it was sent while the step before ran."""
