"""Controllers decide how many tokens each request drafts in each step."""

from __future__ import annotations

from typing import Protocol

from .request import Request


class Controller(Protocol):
    """Chooses draft lengths and learns from what became of them. Pure state: no clock, no randomness of its own."""

    def draft_len(self, request: Request) -> int:
        """Return how many tokens to draft for a decoding request now; 0 calls no drafter."""
        ...

    def observe(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """Learn what one committed step made of a request's drafts."""
        ...

    def forget(self, request: Request) -> None:
        """The request has ended; drop what was kept for it."""
        ...


class FixedDraftLen:
    """The same draft length always."""

    def __init__(self, draft_len: int) -> None:
        self._draft_len = draft_len

    def draft_len(self, request: Request) -> int:
        """Return the configured length."""
        return self._draft_len

    def observe(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """Nothing is learned."""

    def forget(self, request: Request) -> None:
        """Nothing is kept."""
