"""Which sizes a step is padded to, so that few graphs serve all steps: pure, and the same for all ranks."""

from __future__ import annotations

from collections.abc import Sequence

from .plan import Bucket, RequestPlan

_REQUESTS = (1, 2, 4, 8, 16, 32, 64)
_ROWS = (1, 2, 4, 8)
_SMALLEST_CONTEXT = 256
MAX_ROWS = 64
"""Of a rank. A step of more is a prompt's, or a large batch's: it costs the device's time, not the host's."""


def bucket_of(ranks: Sequence[Sequence[RequestPlan]], block_size: int, max_model_len: int) -> Bucket | None:
    """Return the smallest bucket that holds the requests of every rank; None for a step that is not padded.

    The fullest rank, the request with most rows and the longest context say what all are padded to. Prompts' rows and
    wanted log-probabilities of prompts are computed as they come.
    """
    requests = [request for rank in ranks for request in rank]
    num_requests = _at_least(max(1, *map(len, ranks)), _REQUESTS)
    num_rows = _at_least(max((len(request.token_ids) for request in requests), default=1), _ROWS)
    if num_requests is None or num_rows is None or num_requests * num_rows > MAX_ROWS:
        return None
    if any(request.targets for request in requests):
        return None
    slots = max((request.committed_len + len(request.token_ids) for request in requests), default=1)
    size = max(_SMALLEST_CONTEXT, 1 << (slots - 1).bit_length())
    return Bucket(num_requests, num_rows, -(-max(slots, min(size, max_model_len)) // block_size) * block_size)


def _at_least(number: int, sizes: Sequence[int]) -> int | None:
    return next((size for size in sizes if size >= number), None)
