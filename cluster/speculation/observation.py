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
    """A proposal as of a past position, compared with the text that followed. It was verified or not: no matter."""

    key: int
    evidence: Evidence
    num_right: int
    """Leading tokens of the proposal that the text repeated."""
    num_known: int
    """Tokens of the proposal whose fate is known: ``num_right``, and one more unless all compared were right."""
    in_prompt: bool
    """The position lies in the prompt, whose author is not the model."""


@dataclass(frozen=True, slots=True)
class StepObservation:
    """One committed step. Per rank: exact counts; in all: the time from drafting to commit."""

    step_s: float
    requests: Sequence[RequestOutcome]
    """The decoding requests of the step, on all ranks."""
    rows: Sequence[int]
    """Rows that each rank ran, prompt rows included."""
    prefill_rows: Sequence[int]
    """Prompt rows among them."""
    experts: Sequence[float]
    """Distinct experts that each rank computed, a mean over MoE layers."""
    rows_sent: Sequence[float]
    """Rows that each rank sent to others, a row counting once per rank it visits; a mean over MoE layers."""
    trials: Sequence[ShadowTrial] = ()
    """What shadow drafting found since the last step."""

    @property
    def has_prefill(self) -> bool:
        """Whether any rank also computed part of a prompt."""
        return any(self.prefill_rows)
