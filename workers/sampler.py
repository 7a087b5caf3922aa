"""Choose tokens from logits so that the choice depends on nothing but the text before it and the seed.

token at position i = argmax over ids v of (log p_i(v) + Gumbel(seed, choice, i, v)); greedy is the limit without noise;
ties go to the lowest id. The distribution is exactly that of the filtered softmax (Gumbel-max), and a draft is right
iff it equals the token chosen without it.

Shapes: S sampled rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.philox import gumbel
from .plan import RequestPlan
from .sampling_params import TokenSampling

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing logits by them would overflow f32."""


def filter_logits(logits: torch.Tensor, sampling: TokenSampling) -> torch.Tensor:
    """Return ``logits`` [V] f32 over temperature, with the tokens that top-k, top-p and min-p drop at -inf.

    Top-p works on what top-k left, min-p on the whole distribution; at least one token stays. Ties at a boundary keep
    the lower ids.
    """
    scaled = logits / sampling.temperature
    top_k = min(sampling.top_k, len(scaled)) if sampling.top_k > 0 else len(scaled)
    if top_k < len(scaled) or sampling.top_p < 1.0:
        ordered, ids = torch.sort(scaled, descending=True, stable=True)
        keep = torch.arange(len(scaled), device=scaled.device) < top_k
        if sampling.top_p < 1.0:
            mass = torch.softmax(ordered.masked_fill(~keep, -torch.inf), dim=-1)
            keep &= mass.cumsum(dim=-1) - mass < sampling.top_p
        keep[0] = True
        scaled = scaled.masked_fill(~torch.empty_like(keep).scatter_(0, ids, keep), -torch.inf)
    if sampling.min_p > 0.0:
        # p_v / p_max >= min_p, in logarithms
        floor = scaled.max() + torch.log(torch.tensor(sampling.min_p, device=scaled.device))
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    return scaled


def sample(logits: torch.Tensor, samplings: Sequence[TokenSampling], positions: Sequence[int]) -> list[int]:
    """Return one token id for each row of ``logits`` [S, V].

    ``positions[s]`` is the absolute position of the token being chosen.
    """
    if not len(logits):
        return []
    logits = logits.float()
    tokens = torch.argmax(logits, dim=-1).tolist()
    for row, sampling in enumerate(samplings):
        if sampling.temperature < GREEDY_BELOW:
            continue
        filtered = filter_logits(logits[row], sampling)
        ids = torch.nonzero(filtered > -torch.inf)[:, 0]  # ascending: ties still go to the lowest
        noise = gumbel(sampling.seed, sampling.choice, positions[row], ids)
        tokens[row] = int(ids[torch.argmax(filtered[ids] + noise)])
    return tokens


def accept(request: RequestPlan, sampled: Sequence[int]) -> tuple[list[int], list[int]]:
    """Walk the tree of drafts along the sampled tokens.

    ``sampled``: one token per row from ``first_sampled_row`` on. Returns the tokens emitted (accepted drafts and the
    token after the last) and the path of rows whose KV becomes context, known rows included. Both are empty and whole
    respectively for a prompt chunk that yields no token.
    """
    first, num_rows = request.first_sampled_row, len(request.token_ids)
    path = list(range(min(first + 1, num_rows)))
    if first >= num_rows:
        return [], path
    tokens = [sampled[0]]
    row = first
    for child in range(first + 1, num_rows):
        if request.parents[child] == row and request.token_ids[child] == tokens[-1]:
            path.append(child)
            tokens.append(sampled[child - first])
            row = child
    return tokens, path
