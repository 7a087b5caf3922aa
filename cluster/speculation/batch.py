"""The requests of one step as a controller sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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


@dataclass(frozen=True, slots=True)
class Batch:
    """One step over all ranks, before drafts: the coordinator plans for every rank at once."""

    requests: Sequence[RequestView]
    num_ranks: int = 1
    """Ranks that run in lock-step."""
    prompt_rows: Sequence[int] = ()
    """Rows of prompts that each rank is also expected to compute; empty where no rank has any."""

    @property
    def has_prefill(self) -> bool:
        """Whether any rank is also expected to compute part of a prompt."""
        return any(self.prompt_rows)
