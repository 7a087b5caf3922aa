"""Philox4x32-10, the counter-based generator behind every sampled token (plain torch).

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The same words come out of Triton's
``tl.randint4x`` for the same key and counter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ROUND_A = 0xD2511F53
_ROUND_B = 0xCD9E8D57
_KEY_A = 0x9E3779B9
_KEY_B = 0xBB67AE85
_MASK = 0xFFFFFFFF
MAX_GUMBEL = 16.64
"""No noise is larger: -log(-log(1 - 2**-24)) = 16.6355."""
_BLOCK = 8192
"""Counters worked on at a time: so many int64 temporaries stay in a core's cache."""


def _product(constant: int, word: torch.Tensor) -> torch.Tensor:
    """Return ``constant * word`` modulo 2**64, as the int64 of the same bits."""
    return word * (constant - (1 << 64) if constant >> 63 else constant)


def philox4x32(
    key: tuple[int | torch.Tensor, int | torch.Tensor],
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return four 32-bit words per counter, as int64 tensors in [0, 2**32).

    ``key``: two 32-bit integers, or int64 tensors of them. ``counter``: four int64 tensors in [0, 2**32). They
    broadcast.
    """
    key_a, key_b = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # c1 and c3 keep rubbish above their 32 bits, which is cut off where they enter c0 and c2
        a, b = _product(_ROUND_A, c0), _product(_ROUND_B, c2)
        c0, c1, c2, c3 = ((b >> 32) ^ c1 ^ key_a) & _MASK, b, ((a >> 32) ^ c3 ^ key_b) & _MASK, a
        key_a, key_b = (key_a + _KEY_A) & _MASK, (key_b + _KEY_B) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def gumbel_quads(
    seeds: torch.Tensor, choices: torch.Tensor, positions: torch.Tensor, quads: torch.Tensor
) -> torch.Tensor:
    """Return Gumbel(0, 1) noise in f32 [C, 4] for token ids 4q .. 4q + 3 of each of C quads.

    ``seeds`` [C, 2]: the low and the high 32 bits of each seed; the others are [C], all int64.
    """
    blocks = []
    for seed, choice, position, quad in zip(
        *(x.split(_BLOCK) for x in (seeds, choices, positions, quads)), strict=True
    ):
        words = philox4x32((seed[:, 0], seed[:, 1]), (quad, position, choice, torch.zeros_like(quad)))
        # 23 bits and a half step: exact in f32 and never 0 or 1, so both logarithms are finite
        uniform = ((torch.stack(words, dim=-1) >> 9).to(torch.float32) + 0.5) * 2.0**-23
        blocks.append(-torch.log(-torch.log(uniform)))
    return torch.cat(blocks)


def gumbel(seed: int, choice: int, position: int, token_ids: torch.Tensor) -> torch.Tensor:
    """Return Gumbel(0, 1) noise in f32 for ``token_ids`` [N] at one absolute position.

    The noise is a pure function of its arguments, so a token does not depend on the draft, the batch or a replay.
    ``seed``: in [0, 2**63). One Philox call serves four neighbouring token ids.
    """
    quads, place = torch.unique_consecutive(torch.div(token_ids, 4, rounding_mode="floor"), return_inverse=True)
    seeds = split_seeds([seed], token_ids.device).expand(len(quads), 2)
    noise = gumbel_quads(seeds, torch.full_like(quads, choice), torch.full_like(quads, position), quads)
    return noise[place, token_ids % 4]


def split_seeds(seeds: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return the low and high halves [N, 2] of 64-bit seeds."""
    return torch.tensor([(seed & _MASK, seed >> 32) for seed in seeds], dtype=torch.int64, device=device)
