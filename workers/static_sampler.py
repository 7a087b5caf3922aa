"""Tokens of a step chosen on the device, with nothing for the host to wait for.

The rule is `sampler`'s: argmax over ids v of (log p_i(v) + Gumbel(seed, choice, i, v)), greedy without noise, ties to
the lowest id. Filters, bias and penalties are the host's business: a step that has any is sampled by `sampler`.

Shapes: T rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.device import has_triton
from ..kernels.philox import gumbel_quads
from .plan import RequestPlan
from .sampler import GREEDY_BELOW


def samples_plainly(requests: Sequence[RequestPlan]) -> bool:
    """Return whether no row of these requests asks for more than its token, chosen by temperature alone."""
    samplings = [request.sampling for request in requests]
    return all(
        sampling.adjustments is None
        and sampling.logprobs is None
        and (
            sampling.temperature < GREEDY_BELOW or (sampling.top_k <= 0 and sampling.top_p >= 1 and not sampling.min_p)
        )
        for sampling in samplings
    ) and not any(request.targets for request in requests)


def choose_tokens(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    choices: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Return each row's token [T].

    ``logits`` [T, V]; ``temperatures`` [T], below 1e-5 for greedy; ``seeds`` [T, 2]: low and high 32 bits; ``choices``
    [T]; ``positions`` [T] of the tokens that are chosen.
    """
    is_greedy = temperatures < GREEDY_BELOW
    scores = logits.float() / torch.where(is_greedy, 1.0, temperatures).float()[:, None]
    if has_triton(logits.device):
        from ..kernels import token_choice

        return token_choice.choose_tokens(scores, torch.where(is_greedy[:, None], -1, seeds), choices, positions)
    scores = torch.where(is_greedy[:, None], scores, scores + _noise(scores.shape[1], seeds, choices, positions))
    is_best = scores == scores.amax(dim=-1, keepdim=True)
    ids = torch.arange(scores.shape[1], device=logits.device)
    # Of numbers that are none, none is the largest: the last id is still one that can be embedded
    return torch.where(is_best, ids, scores.shape[1] - 1).amin(dim=-1)


def _noise(vocab_size: int, seeds: torch.Tensor, choices: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return [T, V] f32."""
    num_rows, num_quads = len(seeds), -(-vocab_size // 4)
    quads = torch.arange(num_quads, device=seeds.device).repeat(num_rows)
    seeds, choices, positions = (
        key.repeat_interleave(num_quads, dim=0, output_size=len(quads)) for key in (seeds, choices, positions)
    )
    return gumbel_quads(seeds, choices, positions, quads).view(num_rows, -1)[:, :vocab_size]
