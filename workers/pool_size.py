"""The bytes of a rank's KV pool, by what its device has and what steps take on it; the arithmetic is `kv_budget`'s."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch

from .kv_budget import GRAPH_SHARE, fixed_pool_bytes, gpu_pool_bytes, pool_bytes_beside
from .kv_cache import PagedKVCache


def pool_bytes_on(
    device: torch.device,
    cache: PagedKVCache,
    run_largest_step: Callable[[], object],
    *,
    requested: int | None,
    utilization: float,
    gathered_bytes: int,
    most_gathered: int,
    replays_graphs: bool,
) -> int:
    """Return how many bytes the pool of ``cache``, which has been probed, gets on ``device``.

    ``requested`` of them, if given, or on a GPU what is left, once ``run_largest_step`` has shown what a step takes.
    ``gathered_bytes`` and ``most_gathered``: see `pool_bytes_beside`. Raises ``ValueError`` naming the field if the
    device has not so many.
    """
    if device.type == "cpu":
        return fixed_pool_bytes(requested, psutil.virtual_memory().available)
    if requested is not None:
        return fixed_pool_bytes(requested, torch.cuda.mem_get_info(device)[0])
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run_largest_step()
    activation_bytes = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    if replays_graphs:
        activation_bytes *= 1 + GRAPH_SHARE
    left = gpu_pool_bytes(total=total, free=free, activation_bytes=activation_bytes, utilization=utilization)
    slot_bytes = cache.block_bytes // cache.block_size
    return pool_bytes_beside(left, slot_bytes=slot_bytes, gathered_bytes=gathered_bytes, most_gathered=most_gathered)
