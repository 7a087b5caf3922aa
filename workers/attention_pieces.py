"""Attention whose scores are all in memory at once, in pieces: rows of requests, as many as have so many scores.

torch's fused kernels hold none. It does without them for heads that those do not take, and so does attention with
sinks. Each row's attention is its own, so pieces compute what the whole does.

Shapes: R requests, N rows of each, S context slots of each, D numbers of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn.attention import SDPBackend

MOST_SCORES = 32 << 20
"""In one piece: those of 64 heads of a row over 512 Ki tokens."""
SCORE_BYTES = 20
"""Of one score: itself, masked and exponentiated, in float32, beside what was before."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""From query [R, heads, N, D], key and value [R, kv_heads, S, D] and mask [R, 1, N, S] to [R, heads, N, D of value]."""


def is_large(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Return whether there are more scores than a piece has."""
    return query.shape[:3].numel() * key.shape[2] > MOST_SCORES


def holds_scores(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *, grouped: bool
) -> bool:
    """Return whether torch's ``scaled_dot_product_attention`` would hold the scores of these, as it would choose."""
    choice = torch._fused_sdp_choice(query, key, value, mask, enable_gqa=grouped)
    return choice == SDPBackend.MATH.value


def most_score_bytes(num_heads: int, max_model_len: int) -> int:
    """Return the most that the scores of a piece take: one row's are never cut."""
    return SCORE_BYTES * max(MOST_SCORES, num_heads * max_model_len)


def attend_in_pieces(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Return ``attend`` of all, computed in pieces of at most `MOST_SCORES`."""
    num_requests, num_heads, num_rows, _ = query.shape
    if not is_large(query, key):
        return attend(query, key, value, mask)
    output = query.new_empty(num_requests, num_heads, num_rows, value.shape[3])
    for requests, rows in _pieces(num_requests, num_rows, num_heads * key.shape[2]):
        own = None if mask is None else mask[requests, :, rows]
        output[requests, :, rows] = attend(query[requests, :, rows], key[requests], value[requests], own)
    return output


def _pieces(num_requests: int, num_rows: int, row_scores: int) -> Iterator[tuple[slice, slice]]:
    """Yield the requests and rows of each piece: all requests' rows together, if one row of each fits."""
    rows_at_once = max(1, MOST_SCORES // (num_requests * row_scores))
    requests_at_once = num_requests
    if num_requests * row_scores > MOST_SCORES:
        # Whole requests then: keys and values are read once for each piece
        rows_at_once = max(1, min(num_rows, MOST_SCORES // row_scores))
        requests_at_once = max(1, MOST_SCORES // (row_scores * rows_at_once))
    for first_request in range(0, num_requests, requests_at_once):
        for first in range(0, num_rows, rows_at_once):
            yield slice(first_request, first_request + requests_at_once), slice(first, first + rows_at_once)
