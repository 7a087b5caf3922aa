"""Controllers decide how many drafted tokens every request verifies in every step, and under which budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .batch import Batch
from .observation import ShadowTrial, StepObservation
from .proposal import Proposal

PHASES = ("off", "fixed", "baseline", "test", "set", "disabled", "shadow")


@dataclass(frozen=True, slots=True)
class RequestReport:
    """What a controller can say of one request, for `usage` and for metrics."""

    phase: str
    """One of `PHASES`; baseline, test, set and disabled are those of cascade."""
    draft_len: int
    """The length it would verify next (cascade, fixed) or verified last (shadow)."""
    utility: float | None = None
    """Tokens per step over the step's time relative to plain decoding, so far; above 1 speculation has paid."""
    baseline_s: float | None = None
    """Time of a plain step that ``utility`` was measured against."""


class Controller(Protocol):
    """Chooses draft lengths and learns from what became of them. Pure state: no clock, no randomness of its own.

    In each step: `max_draft_lens`, then the drafters propose, then `draft_lens` and `budget_level`; `observe` once the
    step has committed, and `learn` once the next one was planned. A step that failed is planned again with the same
    calls and no `observe`, so none may depend on how often it was called.

    Where `rests` says so, the next step is sent while one runs, without drafts; its `max_draft_lens` and `draft_lens`
    follow the `observe` of that one all the same, with the batch as it was foreseen and ``is_sent``. What they return
    is for learning: nothing is verified.
    """

    wants_trials: bool
    """Whether `learn` is given trials, so that proposals must be kept until the text has followed."""

    def rests(self, batch: Batch) -> bool:
        """Whether no drafts of ``batch`` are worth waiting for the end of the step that runs, whatever that brings.

        Asked before `observe` of that step, and changes nothing.
        """
        ...

    def max_draft_lens(self, batch: Batch) -> list[int]:
        """Return per request the most tokens its drafter should propose, at most its own limit; 0 calls no drafter."""
        ...

    def draft_lens(self, batch: Batch, proposals: Sequence[Proposal]) -> list[int]:
        """Return per request how many tokens of its proposal to verify, in [0, its length and the request's limit].

        ``proposals``: aligned with ``batch.requests``; empty where no drafter was called or had anything.
        """
        ...

    def budget_level(self) -> int | None:
        """Return which of the server's budgets of experts the step that `draft_lens` just planned keeps to, if any.

        An index in their order, the first being the most lenient; without meaning where there is no budget.
        """
        ...

    def reach(self, key: int, proposal: Proposal, length: int) -> list[float]:
        """Return for each of the first ``length`` tokens the probability that it is reached and right, falling."""
        ...

    def observe(self, step: StepObservation) -> None:
        """Take what one committed step made of the drafts and of time, requests that it ended included.

        Ranks wait for it: what the next decision can do without is left to `learn`.
        """
        ...

    def learn(self, trials: Sequence[ShadowTrial]) -> None:
        """Learn from the step that was observed last, while ranks run the next; ``trials``: what is known since.

        Called before the next `observe`, and before `forget` of a request of that step.
        """
        ...

    def forget(self, key: int) -> None:
        """The request has ended, and its last step was observed; drop what was kept for it."""
        ...

    def report(self, key: int) -> RequestReport:
        """Return what is known of a live request."""
        ...
