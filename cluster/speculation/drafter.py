"""Drafters guess the tokens that come next; verification decides. They are registered by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .ngram import NgramDrafter
from .output_store import OutputStore
from .prediction import PredictionDrafter
from .proposal import NOTHING, Proposal
from .suffix import SuffixDrafter


class Drafter(Protocol):
    """Drafts for one request, in microseconds: it keeps an index of the request's text, extended as that grows."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens to the text, prompt first."""
        ...

    def propose(self, max_draft_len: int) -> Proposal:
        """Return at most ``max_draft_len`` (>= 1) guesses of what follows the text; changes nothing."""
        ...


@dataclass(frozen=True, slots=True)
class DraftContext:
    """All that a request's drafter is made from."""

    num_prompt_tokens: int
    prediction: Sequence[int] = ()
    """Tokens of the request's `prediction` content."""
    prompt_lookup_max: int = 3
    prompt_lookup_min: int = 1


class DrafterChain:
    """Several drafters of one request: the first that has a proposal is heard."""

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        self._drafters = drafters

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append to the text of each."""
        for drafter in self._drafters:
            drafter.extend(token_ids)

    def propose(self, max_draft_len: int) -> Proposal:
        """Return the first proposal that is not empty."""
        for drafter in self._drafters:
            if proposal := drafter.propose(max_draft_len):
                return proposal
        return NOTHING


def _ngram(context: DraftContext, store: OutputStore) -> Drafter:
    return NgramDrafter(context.prompt_lookup_max, context.prompt_lookup_min)


def _suffix(context: DraftContext, store: OutputStore) -> Drafter:
    return SuffixDrafter(store)


def _prediction(context: DraftContext, store: OutputStore) -> Drafter:
    return PredictionDrafter(context.prediction, context.num_prompt_tokens)


DrafterFactory = Callable[[DraftContext, OutputStore], Drafter]

_DRAFTERS: dict[str, DrafterFactory] = {
    "ngram": _ngram,
    "suffix": _suffix,
    "prediction": _prediction,
}


def drafter_factory(name: str) -> DrafterFactory:
    """Return what makes a request's drafter; a `prediction` it carries is heard first, whatever the name.

    Raises ``ValueError`` listing the valid names for an unknown one.
    """
    if name not in _DRAFTERS:
        raise ValueError(f"drafter: {name!r} is not one of {', '.join(sorted(_DRAFTERS))}")
    make = _DRAFTERS[name]

    def make_drafter(context: DraftContext, store: OutputStore) -> Drafter:
        drafter = make(context, store)
        if context.prediction and name != "prediction":
            return DrafterChain([_prediction(context, store), drafter])
        return drafter

    return make_drafter
