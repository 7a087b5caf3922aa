"""The bytes of a rank's KV pool, by what its device has and what steps take on it; the arithmetic is `kv_budget`'s."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import psutil
import torch

from .attention_pieces import most_score_bytes
from .graph_room import GraphRoom
from .kv_budget import GRAPH_SHARE, fixed_pool_bytes, gathered_beside, gpu_pool_bytes, mask_bytes, pool_bytes_beside
from .kv_cache import PagedKVCache


class PoolSize(NamedTuple):
    """What a rank's memory is for, beside its weights."""

    num_bytes: int
    """Of the KV pool."""
    graph_room: GraphRoom


def pool_size_on(
    device: torch.device,
    cache: PagedKVCache,
    run_largest_step: Callable[[], object],
    *,
    requested: int | None,
    utilization: float,
    gathered_bytes: int,
    max_num_seqs: int,
    max_num_rows: int,
    max_model_len: int,
    replays_graphs: bool,
) -> PoolSize:
    """Return how many bytes the pool of ``cache``, which has been probed, gets on ``device``, and graphs beside it.

    ``requested`` of them, if given, or on a GPU what is left, once ``run_largest_step`` has shown what a step takes.
    ``gathered_bytes``: see `gathered_slot_bytes`; ``max_num_rows``: of a step. Raises ``ValueError`` naming the field
    if the device has not so many.
    """
    if device.type == "cpu":
        return PoolSize(fixed_pool_bytes(requested, psutil.virtual_memory().available), GraphRoom())
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    num_bytes = None if requested is None else fixed_pool_bytes(requested, free)
    if num_bytes is not None and not replays_graphs:
        return PoolSize(num_bytes, GraphRoom())
    step_bytes = _most_bytes(device, run_largest_step)
    # Of long contexts, which that step has not
    context_bytes = mask_bytes(max_num_rows, max_model_len, cache.itemsize)
    context_bytes += most_score_bytes(cache.most_heads, max_model_len) if cache.holds_scores else 0
    slot_bytes = cache.block_bytes // cache.block_size
    most_gathered = max_num_seqs * max_model_len
    sizes = {"slot_bytes": slot_bytes, "gathered_bytes": gathered_bytes, "most_gathered": most_gathered}
    graph_bytes = None
    if num_bytes is None:
        graph_bytes = GRAPH_SHARE * step_bytes if replays_graphs else 0
        needed = step_bytes + context_bytes + graph_bytes
        left = gpu_pool_bytes(total=total, free=free, activation_bytes=needed, utilization=utilization)
        num_bytes = pool_bytes_beside(left, **sizes)
    reserved = step_bytes + context_bytes + gathered_beside(num_bytes, **sizes)
    return PoolSize(num_bytes, GraphRoom(graph_bytes, reserved))


def _most_bytes(device: torch.device, run_largest_step: Callable[[], object]) -> int:
    """Return the most that the largest step takes at once."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run_largest_step()
    num_bytes = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return num_bytes
