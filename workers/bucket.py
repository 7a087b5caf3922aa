"""Which sizes a step is padded to, so that few graphs serve all steps: pure, and the same for all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .plan import Bucket, RequestPlan

_REQUESTS = (1, 2, 4, 8, 16, 32, 64)
_ROWS = (1, 2, 4, 8)
_SMALLEST_CONTEXT = 256
_FIRST_CONTEXTS = 1024
"""Longest whose graphs are there before the first request, where contexts are gathered and there are many sizes."""
MAX_ROWS = 64
"""Of a rank. A step of more is a prompt's, or a large batch's: it costs the device's time, not the host's."""
_BLOCK_ID_BYTES = 8
_TABLE_BYTES = 256 << 10
"""Of all requests' block tables, which every step copies to the device: about 10 us."""


@dataclass(frozen=True, slots=True)
class Padding:
    """The buckets of one engine: what its configuration can need, and how its ranks attend.

    ``max_num_rows``: most rows of a request that decodes, its drafts and one. ``most_gathered``: most context slots
    that a step may gather, all requests' together; None where attention reads them in place.
    """

    block_size: int
    max_model_len: int
    max_num_seqs: int = MAX_ROWS
    max_num_rows: int = _ROWS[-1]
    most_gathered: int | None = None

    def bucket_of(self, ranks: Sequence[Sequence[RequestPlan]]) -> Bucket | None:
        """Return the smallest bucket that holds the requests of every rank; None for a step that is not padded.

        The fullest rank, the request with most rows and the longest context say what all are padded to. Prompts' rows,
        unless they are as few as drafts, and wanted log-probabilities of prompts are computed as they come.
        """
        requests = [request for rank in ranks for request in rank]
        num_requests = _at_least(max(1, *map(len, ranks)), self._requests)
        num_rows = _at_least(max((len(request.token_ids) for request in requests), default=1), self._rows)
        if num_requests is None or num_rows is None or num_requests * num_rows > MAX_ROWS:
            return None
        if any(request.targets for request in requests):
            return None
        most_slots = max((request.committed_len + len(request.token_ids) for request in requests), default=1)
        num_slots = _at_least(most_slots, self._contexts(num_requests))
        return None if num_slots is None else Bucket(num_requests, num_rows, num_slots)

    def first(self) -> list[Bucket]:
        """Return the buckets whose graphs are to be there before the first request, the largest first.

        All that there are where contexts are read in place; those of contexts up to 1024 where they are gathered.
        """
        buckets = [
            Bucket(num_requests, num_rows, num_slots)
            for num_requests in self._requests
            for num_rows in self._rows
            for num_slots in self._contexts(num_requests)
            if num_requests * num_rows <= MAX_ROWS
            and (self.most_gathered is None or num_slots <= self._whole_blocks(_FIRST_CONTEXTS))
        ]
        return sorted(buckets, key=lambda bucket: (bucket.total_rows, bucket.num_slots), reverse=True)

    @property
    def _requests(self) -> tuple[int, ...]:
        return _up_to(self.max_num_seqs, _REQUESTS)

    @property
    def _rows(self) -> tuple[int, ...]:
        return _up_to(self.max_num_rows, _ROWS)

    def _contexts(self, num_requests: int) -> list[int]:
        """Return the slots of each request that steps of ``num_requests`` may be padded to, whole blocks, ascending.

        Read in place, a context costs no more in a larger bucket, but the tables are as wide as that: one size where
        they are small, else a second one of `_TABLE_BYTES`. Gathered, all of the padding is read: sizes double.
        """
        longest = self._whole_blocks(self.max_model_len)
        if self.most_gathered is None:
            short = _TABLE_BYTES // (_BLOCK_ID_BYTES * num_requests) * self.block_size
            return [short, longest] if 2 * short < longest else [longest]
        sizes, size = [], _SMALLEST_CONTEXT
        while size < self.max_model_len:
            sizes.append(self._whole_blocks(size))
            size *= 2
        return [size for size in dict.fromkeys([*sizes, longest]) if num_requests * size <= self.most_gathered]

    def _whole_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size) * self.block_size


def _at_least(number: int, sizes: Sequence[int]) -> int | None:
    return next((size for size in sizes if size >= number), None)


def _up_to(number: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes that hold ``number``, or less, as tightly as they can."""
    return tuple(size for place, size in enumerate(sizes) if place == 0 or sizes[place - 1] < number)
