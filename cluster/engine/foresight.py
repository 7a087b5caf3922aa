"""Requests as they will be when the step that runs has committed, as far as its plan says.

A row that yields a token yields exactly one where nothing is drafted, so that all lengths are known before the token
is: what cannot be known is only which one, and whether it ends the request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ...workers.plan import SAMPLED_LAST, StepPlan
from .request import Request


def is_foreseeable(plan: StepPlan, requests: Mapping[int, Request]) -> bool:
    """Whether the next step can be planned while ``plan`` runs; ``requests``: those that live, by key.

    Not after drafts, whose number of tokens is open, and not if a rank would have to know a text with a token that only
    it knows.
    """
    for part in (part for rank in plan.ranks for part in rank.requests):
        if part.num_sampled_rows > 1:
            return False
        request = requests.get(part.request_id)
        if request is not None and part.num_sampled_rows and request.has_penalties:
            return False
    return True


@contextmanager
def foreseen(plan: StepPlan, requests: Mapping[int, Request]) -> Iterator[None]:
    """Have the requests of ``plan``, which runs, look as if it had committed, to plan the next step in the meantime.

    `SAMPLED_LAST` stands for the tokens to come. Afterwards they are as they were: only blocks that they have been
    given, and what ranks are told of those, remain.
    """
    parts = [
        (request, part)
        for rank in plan.ranks
        for part in rank.requests
        if (request := requests.get(part.request_id)) is not None
    ]
    for request, part in parts:
        request.committed_len += len(part.token_ids)
        request.token_ids += [SAMPLED_LAST] * part.num_sampled_rows
        request.has_last_rows = not request.num_tokens_left and request.num_pending_tokens == part.num_sampled_rows
    try:
        yield
    finally:
        for request, part in parts:
            request.committed_len -= len(part.token_ids)
            del request.token_ids[len(request.token_ids) - part.num_sampled_rows :]
            request.has_last_rows = False
