"""Layers of bfloat16 experts for float32 rows, at the memory's speed on a CPU.

Decoding computes a few rows with each of many experts, so it costs the reading of their weights. The kernel
(`fused_moe.cpp`) reads each weight once, in the order in which it lies, a whole layer in one call. It is compiled where
it runs, for the processor it runs on, which takes a g++ and a second; without one, callers do without.

Shapes: N rows, H hidden, K experts per row, E weights, O outputs, I inputs, C tiles of a weight, B outputs of a tile.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import subprocess
from collections.abc import Sequence
from functools import cache

import torch
from torch.nn.functional import pad

from .compiled import compile_library

logger = logging.getLogger(__name__)

_FLAGS = ("-fopenmp",)
_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64


def compile_kernel(*, march: str = "native") -> ctypes.CDLL:
    """Compile the kernel for ``march`` and load it; raise ``OSError`` or ``subprocess.SubprocessError`` if it fails."""
    loaded = compile_library("fused_moe", _FLAGS, march=march)
    loaded.grouped_gemm.restype = None
    loaded.grouped_gemm.argtypes = [_POINTER, _POINTER, _COUNT, _POINTER, _POINTER, _COUNT, _COUNT, ctypes.c_int]
    loaded.fused_moe.restype = _COUNT
    loaded.fused_moe.argtypes = [
        *(_POINTER, _POINTER, _COUNT),
        *(_POINTER, _POINTER, _COUNT, _COUNT),
        *(_POINTER, _POINTER, _COUNT, _COUNT, ctypes.c_int),
    ]
    loaded.rms_norm.restype = None
    loaded.rms_norm.argtypes = [_POINTER, _POINTER, _POINTER, _COUNT, _COUNT, ctypes.c_float, ctypes.c_int]
    return loaded


@cache
def kernel() -> ctypes.CDLL | None:
    """Return the kernel for this processor, compiled once a process; None, and a line in the log, if that fails."""
    try:
        return compile_kernel()
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("bfloat16 weights are read by torch's kernels, which are slower: %s", error)
        return None


class TiledWeights:
    """E bfloat16 weights [E, O, I], kept as the kernel reads them: [E, C, I, B], O filled up with zeros."""

    def __init__(self, library: ctypes.CDLL, weights: torch.Tensor) -> None:
        assert weights.dtype == torch.bfloat16
        self.library = library
        self.num_outputs, self.num_inputs = weights.shape[1:]
        self.tile_size = ctypes.c_int.in_dll(library, "tile_size").value
        missing = -self.num_outputs % self.tile_size
        filled = pad(weights, (0, 0, 0, missing)) if missing else weights
        halves = filled.unflatten(1, (-1, 2, self.tile_size // 2))  # [E, C, 2, B / 2, I]
        tiles = halves.permute(0, 1, 4, 3, 2)
        self._num_tiles = halves.shape[1]
        self.pointers = (_POINTER * len(weights))()
        self.hold(list(_huge_pages(tiles.shape).copy_(tiles)))

    def hold(self, tiles: Sequence[torch.Tensor]) -> None:
        """Take ``tiles`` [C, I, B] of each of E weights for one's own, from the next call on; they are not copied."""
        assert len(tiles) == len(self.pointers)
        assert all(weight.is_contiguous() for weight in tiles)
        self.tiles = list(tiles)
        self._places = [weight.data_ptr() for weight in tiles]
        for number, place in enumerate(self._places):
            self.pointers[number] = place

    def room(self) -> torch.Tensor:
        """Return memory for the tiles of one more weight."""
        return _huge_pages(self.tiles[0].shape)

    def multiply(self, rows: torch.Tensor, experts: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Return [N, O] float32: the first ``sizes[0]`` of ``rows`` [N, I] float32 by weight ``experts[0]``, and so on.

        Runs on torch's threads. A row's result depends on that row and its weight alone, to the bit.
        """
        rows = rows.contiguous()
        assert rows.dtype == torch.float32
        assert rows.shape == (sum(sizes), self.num_inputs), "rows fit their weights"
        output = torch.empty(len(rows), self._num_tiles * self.tile_size)
        count = len(sizes)
        self.library.grouped_gemm(
            (_POINTER * count)(*[self._places[expert] for expert in experts]),
            (_COUNT * count)(*sizes),
            count,
            rows.data_ptr(),
            output.data_ptr(),
            self._num_tiles,
            self.num_inputs,
            torch.get_num_threads(),
        )
        return output if output.shape[1] == self.num_outputs else output[:, : self.num_outputs]


def fits(up: TiledWeights, down: TiledWeights) -> bool:
    """Return whether ``fused_moe`` can compute experts of these weights: their inner size is in whole tiles."""
    return up.num_outputs == 2 * down.num_inputs and down.num_inputs % up.tile_size == 0


def fused_moe(
    up: TiledWeights, down: TiledWeights, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Return each row's weighted sum over its experts [N, H] float32, and how many distinct experts ran.

    Experts gate with SiLU and have no biases; ``up`` holds gates, then ups. ``hidden`` [N, H] float32, ``expert_ids``
    [N, K], E or more for "none", ``weights`` [N, K]. Sums go in the order of K. Runs on torch's threads; a row's
    result does not depend on the rows beside it, to the bit. Raises ``IndexError`` for negative ids.
    """
    hidden, expert_ids, weights = hidden.contiguous(), expert_ids.long().contiguous(), weights.float().contiguous()
    assert hidden.dtype == torch.float32
    assert fits(up, down)
    assert hidden.shape[1] == up.num_inputs == down.num_outputs, "rows fit their weights"
    output = torch.empty_like(hidden)
    num_active = up.library.fused_moe(
        up.pointers,
        down.pointers,
        len(up.pointers),
        expert_ids.data_ptr(),
        weights.data_ptr(),
        *expert_ids.shape,
        hidden.data_ptr(),
        output.data_ptr(),
        up.num_inputs,
        down.num_inputs,
        torch.get_num_threads(),
    )
    if num_active < 0:
        raise IndexError("expert_ids: some are negative")
    return output, num_active


def rms_norm(library: ctypes.CDLL, rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``rows`` [.., H] float32, each over its root mean square, times ``weight`` [H]: torch's to rounding."""
    rows = rows.contiguous()
    assert rows.dtype == weight.dtype == torch.float32
    assert weight.shape == rows.shape[-1:]
    assert weight.is_contiguous()
    output = torch.empty_like(rows)
    size = len(weight)
    library.rms_norm(
        rows.data_ptr(),
        weight.data_ptr(),
        output.data_ptr(),
        rows.numel() // size,
        size,
        eps,
        torch.get_num_threads(),
    )
    return output


def _huge_pages(shape: Sequence[int]) -> torch.Tensor:
    """Return bfloat16 memory on huge pages where the system gives any: reading it misses fewer translations."""
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(count * torch.bfloat16.itemsize, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.bfloat16, count=count).view(*shape)
