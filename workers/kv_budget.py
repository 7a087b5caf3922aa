"""How many bytes the KV pool of one rank gets. Pure: what is there has been measured."""

from __future__ import annotations

from .rows import WIDE_ROWS

DEFAULT_BYTES = 256 << 20
GATHERED_BYTES = 1 << 30
"""Most that a padded step may gather in a layer: graphs of larger ones are not worth their padding."""
GRAPH_SHARE = 2
"""Memory that graphs keep, in what the largest step takes: their rows, of all shapes together, are about as many as
that one's, without a budget and once more under one. An estimate."""

_WIDENED_BYTES = 8
"""Of a number in float32, and of the same scaled."""


def gathered_slot_bytes(kept_numbers: int, attended_numbers: int, itemsize: int, *, widens: bool = False) -> int:
    """Return what a context slot takes in a layer that gathers it for torch's attention.

    ``kept_numbers``: what the pool has of it. Beside a copy of those, its keys and values for every head of queries,
    ``attended_numbers``: latents are expanded to them, and torch may copy shared ones so. ``widens``: where torch holds
    all scores, it makes those again in float32, and scales them. Requests of few rows are padded to `WIDE_ROWS`.
    """
    widened = _WIDENED_BYTES * attended_numbers if widens else 0
    return itemsize * (kept_numbers + attended_numbers) + widened + mask_bytes(WIDE_ROWS, 1, itemsize)


def mask_bytes(num_rows: int, num_slots: int, itemsize: int) -> int:
    """Return what it takes to say which of ``num_slots`` each row sees: with a window and without, and for torch.

    torch makes numbers of what is true, and pads them.
    """
    return num_rows * num_slots * (2 + 2 * itemsize)


def fixed_pool_bytes(requested: int | None, available: int) -> int:
    """Return what was asked for, or 256 MiB; raise ``ValueError`` if the device has not so many ``available``."""
    num_bytes = DEFAULT_BYTES if requested is None else requested
    if num_bytes > available:
        raise ValueError(f"kv_cache_bytes: {num_bytes} is not in [1, {available}], the memory that is free")
    return num_bytes


def pool_bytes_beside(num_bytes: int, *, slot_bytes: int, gathered_bytes: int, most_gathered: int) -> int:
    """Return how much of ``num_bytes`` the pool gets, so that what it holds can also be gathered in one layer.

    ``slot_bytes``: of a slot in all layers; ``gathered_bytes``: see `gathered_slot_bytes`; ``most_gathered``: slots
    that all requests of a step can have together. Prompts, and steps too large for graphs, gather whole contexts, and
    as much padding at most (`rows`).
    """
    padded_bytes = 2 * gathered_bytes
    if 2 * num_bytes <= (slot_bytes + padded_bytes) * most_gathered:
        return num_bytes * slot_bytes // (slot_bytes + padded_bytes)
    return num_bytes - gathered_bytes * most_gathered


def gathered_beside(num_bytes: int, *, slot_bytes: int, gathered_bytes: int, most_gathered: int) -> int:
    """Return the most that steps gather in a layer, of a pool of ``num_bytes``; see `pool_bytes_beside`."""
    return gathered_bytes * min(2 * num_bytes // slot_bytes, most_gathered)


def gpu_pool_bytes(*, total: int, free: int, activation_bytes: int, utilization: float) -> int:
    """Return the pool's bytes on a GPU: its share of the memory less weights, activations and what others hold.

    ``total`` and ``free``: of the GPU, with the weights loaded; ``activation_bytes``: the most that a step needs
    besides. As in vLLM, ``utilization`` is of the total, and memory of other processes counts as used. Raises
    ``ValueError`` if nothing is left.
    """
    used = total - free
    num_bytes = int(total * utilization) - used - activation_bytes
    if num_bytes <= 0:
        raise ValueError(
            f"gpu_memory_utilization: {utilization:g} of {total} bytes leaves none for KV: {used} are in use with the "
            f"weights loaded and a step needs {activation_bytes}"
        )
    return num_bytes
