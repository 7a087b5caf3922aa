"""Log-probabilities of given tokens and of the likeliest ones.

Shapes: P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .plan import Logprobs, RequestPlan

_SLICE_ROWS = 64
"""Rows worked on at a time: bounds the f32 copies of logits."""
_LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], num_top: int) -> Logprobs:
    """Return the log-probabilities of ``token_ids`` [P] and of the ``num_top`` likeliest under ``logits`` [P, V]."""
    result = Logprobs([], [], [])
    wanted = torch.tensor(token_ids, device=logits.device)[:, None]
    num_top = min(num_top, logits.shape[-1])
    for rows, ids in zip(logits.split(_SLICE_ROWS), wanted.split(_SLICE_ROWS), strict=True):
        logprobs = torch.log_softmax(rows.float(), dim=-1).clamp_min(_LOWEST)
        own = logprobs.gather(1, ids)
        ranks = (logprobs > own).sum(dim=-1) + 1
        top = logprobs.topk(num_top, dim=-1)
        result.extend(
            Logprobs(
                torch.cat([ids, top.indices], dim=-1).tolist(),
                torch.cat([own, top.values], dim=-1).tolist(),
                ranks.tolist(),
            )
        )
    return result


def target_logprobs(requests: Sequence[RequestPlan], logits: torch.Tensor) -> dict[int, Logprobs]:
    """Return the log-probabilities of the requests' ``targets``; ``logits`` [P, V] are of all their rows in order."""
    result, start = {}, 0
    for request in requests:
        stop = start + len(request.targets)
        if stop > start and request.sampling.prompt_logprobs is not None:
            result[request.request_id] = token_logprobs(
                logits[start:stop], request.targets, request.sampling.prompt_logprobs
            )
        start = stop
    return result
