"""Who is admitted next: a client's requests in order of arrival, and clients by what they have been served."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from .request import Request

_PROMPT_WEIGHT, _OUTPUT_WEIGHT = 1.0, 2.0
"""What a token of a prompt and one of an output count for (the source's values)."""
_MAX_COUNTERS = 4096
"""Clients that are remembered; of more, those who have nothing waiting are forgotten."""


class FairQueue:
    """Waiting requests. The next is the oldest of the client that has been served least.

    Every client has a counter of the tokens that it was served: prompts when they are admitted, outputs as they come.
    Who comes back after a time without waiting requests starts no lower than those that wait, so nobody saves up a
    claim. Clients that always have requests waiting are served alike but for the size of a request; with one client
    the order is that of arrival. Requests that lost their KV come before all others, since they were admitted once.

    Source: virtual token counters, "Fairness in Serving Large Language Models" (arXiv 2401.00588), section 4.
    """

    def __init__(self) -> None:
        self._returned: list[Request] = []
        self._waiting: dict[str, list[Request]] = {}
        self._counters: dict[str, float] = {}
        self._level = 0.0
        """Counter of the client that was the last to have nothing waiting any more."""

    def __len__(self) -> int:
        return len(self._returned) + sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Request]:
        """Yield those that were admitted once, then the others by arrival."""
        yield from self._returned
        yield from sorted((request for requests in self._waiting.values() for request in requests), key=_arrival)

    def add(self, request: Request) -> None:
        """Queue a request in its place by arrival."""
        if request.was_admitted:
            insort(self._returned, request, key=_arrival)
            return
        if request.client not in self._waiting:
            level = min((self._counters[client] for client in self._waiting), default=self._level)
            if len(self._counters) >= _MAX_COUNTERS:
                self._counters = {client: self._counters[client] for client in self._waiting}
            self._counters[request.client] = max(self._counters.get(request.client, 0.0), level)
            self._waiting[request.client] = []
        insort(self._waiting[request.client], request, key=_arrival)

    def next(self) -> Request:
        """Return the request to admit next; there must be one."""
        if self._returned:
            return self._returned[0]
        return min(
            (requests[0] for requests in self._waiting.values()),
            key=lambda request: (self._counters[request.client], request.key),
        )

    def remove(self, request: Request) -> None:
        """Take a request out."""
        if request.was_admitted:
            self._returned.remove(request)
            return
        requests = self._waiting[request.client]
        requests.remove(request)
        if not requests:
            del self._waiting[request.client]
            self._level = self._counters[request.client]

    def charge(self, client: str, *, num_prompt_tokens: int = 0, num_output_tokens: int = 0) -> None:
        """Count what a client was served."""
        if client in self._counters:
            self._counters[client] += _PROMPT_WEIGHT * num_prompt_tokens + _OUTPUT_WEIGHT * num_output_tokens


def _arrival(request: Request) -> int:
    return request.key
