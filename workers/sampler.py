"""Choose tokens from logits so that the choice depends on nothing but the text before it and the seed.

token at position i = argmax over ids v of (log p_i(v) + Gumbel(seed, choice, i, v)); greedy is the limit without noise;
ties go to the lowest id. The distribution is exactly that of the filtered softmax (Gumbel-max), and a draft is right
iff it equals the token chosen without it.

Shapes: S sampled rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from ..kernels.device import has_triton
from ..kernels.philox import MAX_GUMBEL, gumbel_quads, split_seeds
from .plan import RequestPlan
from .sampling_params import TokenSampling

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing logits by them would overflow f32."""
_TOP_P_HEAD = 1024
"""How many of the likeliest tokens top-p looks at before it sorts them all."""
_FIRST_QUADS = 16
"""How many quads of the likeliest tokens get noise before the others are looked at."""


def filter_logits(logits: torch.Tensor, samplings: Sequence[TokenSampling]) -> torch.Tensor:
    """Return ``logits`` [S, V] over temperature in f32, with what top-k, top-p and min-p drop at -inf.

    Top-p works on what top-k left, min-p on the whole distribution; at least one token stays. Ties at a boundary keep
    the lower ids.
    """
    temperatures = torch.tensor([s.temperature for s in samplings], dtype=torch.float32, device=logits.device)
    scaled = logits.float() / temperatures[:, None]
    for row, sampling in zip(scaled, samplings, strict=True):
        top_k = min(sampling.top_k, len(row)) if sampling.top_k > 0 else len(row)
        if top_k < len(row) or sampling.top_p < 1.0:
            row.masked_fill_(~_keep_likeliest(row, top_k, sampling.top_p), -torch.inf)
        if sampling.min_p > 0.0:
            # p_v / p_max >= min_p, in logarithms
            row.masked_fill_(row < row.max() + math.log(sampling.min_p), -torch.inf)
    return scaled


def _keep_likeliest(scaled: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Return [V] bool: what top-k and then top-p keep of ``scaled``."""
    head = top_k if top_k < len(scaled) else min(_TOP_P_HEAD, len(scaled))
    likeliest = torch.topk(scaled, head).values
    log_mass = torch.logsumexp(likeliest if top_k < len(scaled) else scaled, dim=-1)
    mass = torch.exp(likeliest - log_mass)
    if top_k == len(scaled) > head and float(mass.sum()) < top_p:
        likeliest = torch.sort(scaled, descending=True).values
        mass = torch.exp(likeliest - log_mass)
    count = len(likeliest) if top_p >= 1.0 else max(1, int((mass.cumsum(dim=-1) - mass < top_p).sum()))
    keep = scaled > likeliest[count - 1]
    ties = torch.nonzero(scaled == likeliest[count - 1])[: count - int(keep.sum()), 0]
    return keep.index_fill(0, ties, True)


def sample(logits: torch.Tensor, samplings: Sequence[TokenSampling], positions: Sequence[int]) -> list[int]:
    """Return one token id for each row of ``logits`` [S, V].

    ``positions[s]`` is the absolute position of the token being chosen.
    """
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature >= GREEDY_BELOW]
    # f32 first: argmax of bfloat16 is slow on a CPU
    tokens = torch.argmax(logits.float(), dim=-1).tolist() if len(drawn) < len(samplings) else [-1] * len(samplings)
    if drawn:
        chosen = [samplings[row] for row in drawn]
        scores = filter_logits(logits if len(drawn) == len(logits) else logits[drawn], chosen)
        for row, token in zip(drawn, _gumbel_argmax(scores, chosen, [positions[r] for r in drawn]), strict=True):
            tokens[row] = token
    return tokens


def _gumbel_argmax(scores: torch.Tensor, samplings: Sequence[TokenSampling], positions: Sequence[int]) -> list[int]:
    """Return argmax over v of ``scores`` [N, V] plus noise, per row; ties go to the lowest id.

    Noise is bounded, so it is drawn for tokens that can still win, four neighbours (a quad) at a time: first for the
    likeliest few, then for all that the best of those does not rule out.
    """
    device = scores.device
    seeds = split_seeds([s.seed for s in samplings], device)
    choices = torch.tensor([s.choice for s in samplings], device=device)
    places = torch.tensor(positions, device=device)
    if has_triton(device):
        from ..kernels.token_choice import choose_tokens

        return choose_tokens(scores, seeds, choices, places).tolist()
    by_quad = pad(scores, (0, -scores.shape[1] % 4), value=-torch.inf).unflatten(1, (-1, 4))  # [N, Q, 4]
    peaks = by_quad.amax(dim=-1)

    def totals(rows: torch.Tensor, quads: torch.Tensor) -> torch.Tensor:
        return by_quad[rows, quads] + gumbel_quads(seeds[rows], choices[rows], places[rows], quads)

    likeliest = torch.topk(peaks, min(_FIRST_QUADS, peaks.shape[1]), dim=-1).indices
    rows = torch.arange(len(scores), device=device).repeat_interleave(likeliest.shape[1])
    best = totals(rows, likeliest.flatten()).view(len(scores), -1).amax(dim=-1)
    rows, quads = torch.nonzero(peaks + MAX_GUMBEL >= best[:, None], as_tuple=True)
    drawn = totals(rows, quads).split(torch.bincount(rows, minlength=len(scores)).tolist())
    ids = (4 * quads).split([len(part) for part in drawn])
    return [int(_first_argmax(part, first)) for part, first in zip(drawn, ids, strict=True)]


def _first_argmax(totals: torch.Tensor, first_ids: torch.Tensor) -> torch.Tensor:
    """Return the token id of the largest of ``totals`` [C, 4], whose rows begin at ``first_ids``."""
    place = torch.argmax(totals)
    return first_ids[place // 4] + place % 4


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
