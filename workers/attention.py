"""The attention seam: transformers' attention interface over the paged pool's groups.

``PagedKVCache.update`` hands every layer the context of the step's groups; this function cuts it by group and attends.
It serves grouped-query and latent (MLA) attention, sliding windows included, since all it sees are keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from .kv_cache import PagedKVCache

ATTENTION = "penstock"


def bind(model: torch.nn.Module, cache: PagedKVCache) -> None:
    """Let every attention module of ``model`` find the step's layout."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.penstock_cache = cache  # type: ignore[assignment]


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend each group's queries to its own context.

    query [1, heads, T, D], key and value [1, kv_heads, slots, D]; returns [1, T, heads, D of value].
    """
    if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
        raise ValueError("model: attention sinks and soft caps are not supported")
    cache: Any = module.penstock_cache
    rows = cache.rows
    packed = query[0].transpose(0, 1)
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    grouped = query.shape[1] != key.shape[1]
    output = packed.new_empty(packed.shape[0], packed.shape[1], values.shape[-1])
    start = 0
    for group in rows.groups:
        r, n = group.rows.shape
        stop = start + group.num_slots
        result = scaled_dot_product_attention(
            packed[group.rows].transpose(1, 2),
            keys[start:stop].unflatten(0, (r, -1)).transpose(1, 2),
            values[start:stop].unflatten(0, (r, -1)).transpose(1, 2),
            attn_mask=group.mask(sliding_window),
            scale=scaling,
            enable_gqa=grouped,
        )
        flat = result.transpose(1, 2).reshape(r * n, *output.shape[1:])
        output[group.packed_rows] = flat[group.scatter]
        start = stop
    return output[None], None


AttentionInterface.register(ATTENTION, paged_attention)
