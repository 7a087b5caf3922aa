"""Attention that reads the KV pool's blocks where they lie, by torch's flex_attention, and when it can.

On a GPU it is compiled, once for each shape of bucket; elsewhere, in tests, torch computes it from all scores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from math import gcd
from typing import Any, NamedTuple, cast

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, FlexKernelOptions, flex_attention

from ..kernels.device import has_triton
from .kv_cache import PagedKVCache
from .latent_attention import Absorbed, into_latents, out_of_latents

logger = logging.getLogger(__name__)

_TILE = 16
"""Rows and slots that a program takes at least: what matrix units multiply."""
_MOST_ROWS = 128
_MOST_SLOT_BYTES = 64
"""Of one number in each slot; more slots at once spill registers."""
_SHARED_BYTES = 96 << 10
"""Of a program: what small GPUs have, and large ones twice over."""
_SHARED_SLACK = 2 << 10
"""For what is put beside tiles."""
_LATENT_HEADS = 16
"""Most heads of latent attention that share a program's rows: more of them have programs of their own."""
_LEAST_PART = 64
"""Slots that a program reads of the longest context: about as many bytes as its sums, which are stored and read."""
_SHAPES = 256
"""Most that are compiled, more than torch thinks healthy; one more is an error."""


def objection(cache: PagedKVCache, device: torch.device) -> str:
    """Return why attention on ``device`` cannot read the pools of ``cache`` in place; nothing if it can."""
    if not has_triton(device):
        return "Triton is not installed"
    if not cache.attends_to_what_it_keeps and not cache.keeps_latents:
        return "the model makes keys and values of what it keeps of a token"
    if cache.block_size % _TILE:
        return f"block_size is {cache.block_size}, no multiple of {_TILE}"
    narrow = min(map(min, cache.widths))
    if narrow < _TILE:
        return f"its heads have {narrow} numbers, less than {_TILE}"
    if cache.keeps_latents:
        needed = max(_latent_bytes(_TILE, _TILE, widths, cache.pools[0].dtype.itemsize) for widths in cache.widths)
        if needed > _Gpu.of(device).shared_bytes:
            return f"a tile of its latents takes {needed >> 10} KiB of shared memory, more than there is"
    if any(pool.numel() >= 1 << 31 for pool in cache.pools):
        return "a layer's pool has more numbers than 32 bits count"
    return ""


def say(reason: str) -> None:
    """Log how replayed steps attend; ``reason`` is why not in place, if it is not."""
    if reason:
        logger.warning("attention: replayed steps gather padded contexts, for torch's dense attention: %s", reason)
    else:
        logger.info("attention: replayed steps read the KV pool in place, by torch's flex_attention")


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: BlockMask,
    sinks: torch.Tensor | None,
    scaling: float | None,
    absorbed: Absorbed | None = None,
) -> torch.Tensor:
    """Attend to the slots that ``mask`` lists and lets be seen; return [R, heads, N, D of values].

    query [R, heads, N, D], keys and values [1, kv_heads, slots, D], which are views of a layer's pool, ``sinks``
    [heads] or None. A row that sees nothing gets zeros. ``absorbed``: where keys and values are latents, which it
    makes into those that queries are for.
    """
    widths, itemsize = (keys.shape[3], values.shape[3]), keys.dtype.itemsize
    if absorbed is None:
        options = kernel_options(
            num_rows=query.shape[2],
            group_size=query.shape[1] // keys.shape[1],
            block_size=mask.BLOCK_SIZE[1],
            widths=widths,
            itemsize=itemsize,
        )
    else:
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        group_size = gcd(query.shape[1], _LATENT_HEADS)
        keys, values = (states.expand(-1, query.shape[1] // group_size, -1, -1) for states in (keys, values))
        options = latent_options(
            num_requests=query.shape[0],
            num_rows=query.shape[2],
            num_heads=query.shape[1],
            block_size=mask.BLOCK_SIZE[1],
            most_blocks=mask.kv_indices.shape[-1],
            widths=widths,
            itemsize=itemsize,
            gpu=_Gpu.of(query.device),
        )
    if not query.is_cuda:
        return attend_with(query, keys, values, mask, sinks, scaling, options, absorbed)
    with torch._dynamo.config.patch(recompile_limit=_SHAPES):
        return _compiled()(query, keys, values, mask, sinks, scaling, options, absorbed)


def attend_with(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: BlockMask,
    sinks: torch.Tensor | None,
    scaling: float | None,
    options: FlexKernelOptions,
    absorbed: Absorbed | None = None,
) -> torch.Tensor:
    """Compute `attend`; what is compiled."""
    query = query if absorbed is None else into_latents(query, absorbed)
    output = _attend(query, keys, values, mask, sinks, scaling, options)
    return output if absorbed is None else out_of_latents(output, absorbed)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: BlockMask,
    sinks: torch.Tensor | None,
    scaling: float | None,
    options: FlexKernelOptions,
) -> torch.Tensor:
    grouped = query.shape[1] != keys.shape[1]
    if sinks is None:
        return flex_attention(
            query, keys, values, block_mask=mask, scale=scaling, enable_gqa=grouped, kernel_options=options
        )
    output, found = flex_attention(
        query,
        keys,
        values,
        block_mask=mask,
        scale=scaling,
        enable_gqa=grouped,
        kernel_options=options,
        return_aux=AuxRequest(lse=True),
    )
    assert found.lse is not None
    # One more place in the softmax, which holds no value
    return (output * torch.sigmoid(found.lse - sinks.float()[:, None])[..., None]).to(output.dtype)


def kernel_options(
    *, num_rows: int, group_size: int, block_size: int, widths: tuple[int, int], itemsize: int
) -> FlexKernelOptions:
    """Return how flex_attention's kernels are cut, for ``group_size`` heads of queries to a head of keys.

    ``widths``: numbers of a head's key and value, of ``itemsize`` bytes. A tile of slots divides a block of the pool.
    The decoding kernel, which takes a power of two of heads alone, has a group's rows in a tile; the other one has a
    head's. `benchmarks.attention_limits` compiles what this returns; torch's own choice spills registers at 128 rows.
    """
    is_decoding = not group_size & (group_size - 1)
    key, value = map(_power_of_two, widths)
    slots = min(block_size & -block_size, _MOST_SLOT_BYTES // itemsize)
    least = max(_TILE, group_size if is_decoding else 0)
    rows = max(least, min(_power_of_two(num_rows * group_size if is_decoding else num_rows), _MOST_ROWS))

    def is_small(rows: int, stages: int) -> bool:
        in_loop = rows * key + stages * slots * (key + value)
        return max(in_loop * itemsize, rows * value * 4) <= _SHARED_BYTES  # sums are f32, and stored through it

    while rows > least and not is_small(rows, 2):
        rows //= 2
    stages = next((number for number in (3, 2) if is_small(rows, number)), 1)
    # Triton 3.6 spills f32 of the smallest tile in two warps, and 3.9 that of the next one in four
    least_warps = 4 if itemsize == 4 and rows == _TILE else 2
    return {
        "BLOCK_M": rows,
        "BLOCK_N": slots,
        "num_warps": min(max(least_warps, rows * slots // 256, rows * value // 2048), 8),
        "num_stages": stages,
    }


class _Gpu(NamedTuple):
    """What a device has."""

    processors: int
    shared_bytes: int
    """That one program may have."""

    @classmethod
    def of(cls, device: torch.device) -> _Gpu:
        if device.type != "cuda" or not torch.cuda.is_available():  # where nothing is compiled
            return cls(1, _SHARED_BYTES)
        found: Any = torch.cuda.get_device_properties(device)
        return cls(found.multi_processor_count, found.shared_memory_per_block_optin)


def latent_options(
    *,
    num_requests: int,
    num_rows: int,
    num_heads: int,
    block_size: int,
    most_blocks: int,
    widths: tuple[int, int],
    itemsize: int,
    gpu: _Gpu,
) -> FlexKernelOptions:
    """Return how flex_attention's decoding kernel is cut for latents, which all heads attend to, in groups of them.

    It rounds a latent of 512 numbers with its position's 64 up to 1024, of which it reads those that there are. A
    program of 16 rows leaves room for another on its processor; of 32, latents are read half as often, from the cache
    between processors as a rule. A context is cut into as many parts as fill the processors once, but the longest of
    ``most_blocks`` into none of fewer than 64 slots, since each program stores its sums in f32. torch cuts without
    regard to tiles of rows: 8 times as finely for 8 rows of 16 heads.
    """
    group_size = gcd(num_heads, _LATENT_HEADS)
    slots = min(block_size & -block_size, _MOST_SLOT_BYTES // itemsize)
    while slots > _TILE and _latent_bytes(_TILE, slots, widths, itemsize) > _SHARED_BYTES:
        slots //= 2
    fits = _latent_bytes(2 * _TILE, slots, widths, itemsize) <= gpu.shared_bytes
    rows = 2 * _TILE if fits and num_rows * group_size > _TILE else _TILE
    num_programs = num_requests * (num_heads // group_size) * -(-num_rows * group_size // rows)
    num_parts = min(gpu.processors // num_programs, most_blocks * block_size // _LEAST_PART)
    options = {
        "BLOCK_M": rows,
        "BLOCK_N": slots,
        "num_warps": rows // 4,
        "num_stages": 2,
        "SPLIT_KV": max(1, num_parts),
    }
    return cast(
        FlexKernelOptions, options
    )  # which lacks the last: it is the kernel's, and not among what is documented


def _latent_bytes(rows: int, slots: int, widths: tuple[int, int], itemsize: int) -> int:
    """Return the shared memory that a program takes for its queries and a tile of slots."""
    key, value = map(_power_of_two, widths)
    return (rows * key + slots * (key + value)) * itemsize + _SHARED_SLACK


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


@cache
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(attend_with, fullgraph=True, dynamic=False)
