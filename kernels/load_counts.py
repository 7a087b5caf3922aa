"""What experts have to do, counted where the rows' choices are, in one launch a layer.

Shapes: T rows of this rank, V rows that reached it, K experts per row, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_PAIRS = 256


def count_loads(counts: torch.Tensor, chosen: torch.Tensor, received: torch.Tensor, num_local: int) -> None:
    """Add the ids ``chosen`` [T, K], up to E for "none", to ``counts`` [E + 2] int64, each at its place.

    Added to the last: how many of the local ids ``received`` [V, K] are less than ``num_local``. The order of whole
    numbers changes no sum, so they are added by atomics.
    """
    num_pairs = max(chosen.numel(), received.numel())
    if num_pairs:
        _count_loads[(triton.cdiv(num_pairs, _PAIRS),)](
            counts,
            chosen.contiguous(),
            received.contiguous(),
            chosen.numel(),
            received.numel(),
            num_local,
            len(counts) - 1,
            PAIRS=_PAIRS,
            num_warps=4,
        )


def count_loads_reference(counts: torch.Tensor, chosen: torch.Tensor, received: torch.Tensor, num_local: int) -> None:
    """Do the same in torch's operations."""
    flat = chosen.flatten().long()
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    counts[-1] += (received < num_local).sum()


@triton.jit
def _count_loads(
    counts,
    chosen,
    received,
    num_chosen,
    num_received,
    num_local,
    last,
    PAIRS: tl.constexpr,
):
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    is_chosen = pairs < num_chosen
    experts = tl.load(chosen + pairs, mask=is_chosen, other=0)
    tl.atomic_add(counts + experts, tl.full([PAIRS], 1, tl.int64), mask=is_chosen)
    local = tl.load(received + pairs, mask=pairs < num_received, other=num_local)
    tl.atomic_add(counts + last, tl.sum((local < num_local).to(tl.int64), axis=0))
