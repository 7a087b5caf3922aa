"""Philox4x32-10, the counter-based generator behind every sampled token (plain torch).

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The same words come out of Triton's
``tl.randint4x`` for the same key and counter.
"""

from __future__ import annotations

import torch

_ROUND_A = 0xD2511F53
_ROUND_B = 0xCD9E8D57
_KEY_A = 0x9E3779B9
_KEY_B = 0xBB67AE85
_MASK = 0xFFFFFFFF


def _mul_hi_lo(constant: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both 32-bit halves of ``constant * word``; int64 holds 63 bits, so the constant goes in two halves."""
    low = word * (constant & 0xFFFF)
    high = word * (constant >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(
    key: tuple[int, int], counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return four 32-bit words per counter, as int64 tensors in [0, 2**32).

    ``key``: two 32-bit integers. ``counter``: four broadcastable int64 tensors in [0, 2**32).
    """
    key_a, key_b = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high_a, low_a = _mul_hi_lo(_ROUND_A, c0)
        high_b, low_b = _mul_hi_lo(_ROUND_B, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ key_a, low_b, high_a ^ c3 ^ key_b, low_a
        key_a, key_b = (key_a + _KEY_A) & _MASK, (key_b + _KEY_B) & _MASK
    return c0, c1, c2, c3


def gumbel(seed: int, choice: int, position: int, token_ids: torch.Tensor) -> torch.Tensor:
    """Return Gumbel(0, 1) noise in f32 for ``token_ids`` [N] at one absolute position.

    The noise is a pure function of its arguments, so a token does not depend on the draft, the batch or a replay.
    ``seed``: in [0, 2**63). One Philox call serves four neighbouring token ids.
    """
    quads, place = torch.unique_consecutive(torch.div(token_ids, 4, rounding_mode="floor"), return_inverse=True)
    zero = torch.zeros((), dtype=torch.int64, device=token_ids.device)
    words = philox4x32((seed & _MASK, seed >> 32), (quads, zero + position, zero + choice, zero))
    table = torch.stack(torch.broadcast_tensors(*words), dim=-1)  # [quads, 4]
    word = table[place, token_ids % 4]
    # 23 bits and a half step: exact in f32 and never 0 or 1, so both logarithms are finite
    uniform = ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))
