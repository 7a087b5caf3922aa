"""How many bytes the KV pool of one rank gets. Pure: what is there has been measured."""

from __future__ import annotations

DEFAULT_BYTES = 256 << 20


def fixed_pool_bytes(requested: int | None, available: int) -> int:
    """Return what was asked for, or 256 MiB; raise ``ValueError`` if the device has not so many ``available``."""
    num_bytes = DEFAULT_BYTES if requested is None else requested
    if num_bytes > available:
        raise ValueError(f"kv_cache_bytes: {num_bytes} is not in [1, {available}], the memory that is free")
    return num_bytes


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
