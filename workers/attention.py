"""The attention seam: transformers' attention interface over the paged pool.

``PagedKVCache.update`` hands every layer the context of the step's groups; this function cuts it by group and attends.
It serves grouped-query and latent (MLA) attention, sliding windows included, since all it sees are keys and values.
Where a step reads the pool's blocks in place, ``update`` hands on the pool itself, and `page_attention` attends to it;
layers of latent attention then leave latents as they are (`latent_attention`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from . import page_attention
from .attention_pieces import attend_in_pieces, holds_scores, is_large
from .kv_cache import PagedKVCache
from .latent_attention import Absorbed
from .rows import PackedRows

ATTENTION = "penstock"

# What layers pass on and what changes nothing here: positions and visibility follow from the plan
_IGNORED = {
    "cache_position",
    "dropout",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "use_cache",
}


def bind(model: torch.nn.Module, cache: PagedKVCache) -> None:
    """Let every attention module of ``model`` find the step's layout."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.penstock_cache = cache  # type: ignore[assignment]


def window_mask(*, local_size: int | None = None, use_vmap: bool = False, **kwargs: Any) -> int | None:
    """Stand in for transformers' mask functions: return the sliding window of the layers that ask, None for no window.

    Some layers do not hand their window to the attention function, so it is taken from where their mask is made.
    """
    if use_vmap:  # a condition was added to causality
        raise ValueError("model: its attention mask is more than causal, which is not supported")
    return local_size


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: int | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend each group's queries to its own context.

    query [1, heads, T, D], key and value [1, kv_heads, slots, D], ``s_aux`` [heads] the heads' sinks;
    ``attention_mask`` is what ``window_mask`` returned. Returns [1, T, heads, D of value]. Raises ``ValueError``
    naming ``model`` for a feature that is not known here.
    """
    if not isinstance(attention_mask, int | None):
        raise ValueError("model: its attention makes a mask of its own, which is not supported")
    window = sliding_window if attention_mask is None else attention_mask
    for name, given in kwargs.items():
        if given is not None and name not in _IGNORED:
            raise ValueError(f"model: its attention uses {name}, which is not supported")
    cache: PagedKVCache = module.penstock_cache  # type: ignore[assignment]
    if cache.is_probing:
        _note(cache, query, key, value, s_aux)
    assert cache.rows is not None
    rows: PackedRows = cache.rows
    if rows.pages is not None:
        queries = query[0].unflatten(1, rows.pages.positions.shape).transpose(0, 1)  # [R, heads, N, D]
        absorbed: Absorbed | None = getattr(module, "penstock_absorbed", None)
        result = page_attention.attend(queries, key, value, rows.pages.mask(window), s_aux, scaling, absorbed)
        return result.transpose(1, 2).flatten(0, 1)[None], None
    only = rows.groups[0]
    if only.is_whole and len(only.rows) == 1:  # one request's rows and context are the group's as they are
        return _attend(query, key, value, only.mask(window), s_aux, scaling).transpose(1, 2), None
    packed = query[0].transpose(0, 1)
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    output = packed.new_empty(packed.shape[0], packed.shape[1], values.shape[-1])
    start = 0
    for group in rows.groups:
        r, n = group.rows.shape
        stop = start + group.num_slots
        queries = (packed.unflatten(0, (r, n)) if group.is_whole else packed[group.rows]).transpose(1, 2)
        key_, value_ = (states[start:stop].unflatten(0, (r, -1)).transpose(1, 2) for states in (keys, values))
        result = _attend(queries, key_, value_, group.mask(window), s_aux, scaling)
        flat = result.transpose(1, 2).reshape(r * n, *output.shape[1:])
        if group.is_whole:
            return flat[None], None
        output[group.packed_rows] = flat[group.scatter]
        start = stop
    return output[None], None


def _note(
    cache: PagedKVCache, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None
) -> None:
    """Have ``cache`` learn from the probing forward what attention is, and what it takes."""
    mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    shared_key, shared_value, grouped = _shared(query, key, value, mask)
    is_plain = sinks is None and holds_scores(query, shared_key, shared_value, mask, grouped=grouped)
    cache.note_attended(query, key, value, holds_scores=is_plain or sinks is not None, widens=is_plain)


def _shared(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return keys and values as torch's attention is to take them, and whether heads of queries share them."""
    repeats = query.shape[1] // key.shape[1]
    if repeats == 1 or not query.is_cuda or mask is None:
        return key, value, repeats > 1
    # There, torch has masks and shared heads together only where it holds all scores
    return key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1), False


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    if sinks is not None:
        return attend_with_sinks(query, key, value, mask, sinks, scaling)
    key, value, grouped = _shared(query, key, value, mask)

    attend = partial(scaled_dot_product_attention, scale=scaling, enable_gqa=grouped)
    if is_large(query, key) and holds_scores(query, key, value, mask, grouped=grouped):
        return attend_in_pieces(attend, query, key, value, mask)
    return attend(query, key, value, attn_mask=mask)


def attend_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Attention whose softmax has one more place, the head's learned sink, that holds no value (GPT-OSS).

    query [R, heads, N, D], key and value [R, kv_heads, S, D], mask [R, 1, N, S] bool or None for all, sinks
    [heads]. torch's own attention has no such argument.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        scores = query @ key.transpose(-1, -2) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        place = sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, place], dim=-1).float(), dim=-1)[..., :-1]
        return weights.to(value.dtype) @ value

    return attend_in_pieces(attend, query, key, value, mask)


def keep_whole() -> None:
    """From now on, let torch's compiler call attention as it is instead of compiling what it does."""
    disable: Any = torch.compiler.disable
    AttentionInterface.register(ATTENTION, disable(paged_attention))


AttentionInterface.register(ATTENTION, paged_attention)
AttentionMaskInterface.register(ATTENTION, window_mask)
