"""Groups of float32 rows, each times its own bfloat16 weight, at the memory's speed on a CPU without bfloat16.

Decoding computes a few rows with each of many experts, so it costs the reading of their weights. The kernel
(`grouped_gemm.cpp`) reads them once, in the order in which they lie, all groups in one call. It is compiled where it
runs, for the processor it runs on, which takes a g++ and half a second; without one, callers do without.

Shapes: E weights, O outputs, I inputs, C tiles of a weight, B outputs of a tile, N rows.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch.nn.functional import pad

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("grouped_gemm.cpp")
_FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
_COMPILE_S = 120.0
_MOST_ROWS = 64
"""Larger groups are cut: so many rows' results for a tile still have their pages at hand."""


def compile_kernel(*, march: str = "native") -> ctypes.CDLL:
    """Compile the kernel for ``march`` and load it; raise ``OSError`` or ``subprocess.SubprocessError`` if it fails."""
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        library = Path(folder) / "grouped_gemm.so"
        compiler = shutil.which("g++")
        if compiler is None:
            raise FileNotFoundError("there is no g++")
        command = [compiler, *_FLAGS, f"-march={march}", str(_SOURCE), "-o", str(library)]
        subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_S)
        return ctypes.CDLL(str(library))


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
        assert weights.dtype == torch.bfloat16 and weights.dim() == 3
        self._library = library
        self._num_outputs, self._length = weights.shape[1:]
        tile_size = ctypes.c_int.in_dll(library, "tile_size").value
        missing = -self._num_outputs % tile_size
        filled = pad(weights, (0, 0, 0, missing)) if missing else weights
        halves = filled.unflatten(1, (-1, 2, tile_size // 2))  # [E, C, 2, B / 2, I]
        self._tiles = _huge_pages(halves.permute(0, 1, 4, 3, 2))
        self._num_tiles, self._padded_outputs = halves.shape[1], filled.shape[1]
        self._places = [weight.data_ptr() for weight in self._tiles]

    def multiply(self, rows: torch.Tensor, experts: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Return [N, O] float32: the first ``sizes[0]`` of ``rows`` [N, I] float32 by weight ``experts[0]``, and so on.

        Runs on torch's threads. A row's result depends on that row and its weight alone, to the bit.
        """
        rows = rows.contiguous()
        assert rows.dtype == torch.float32 and rows.shape == (sum(sizes), self._length), "rows fit their weights"
        if max(sizes, default=0) > _MOST_ROWS:
            experts, sizes = _cut(experts, sizes)
        output = torch.empty(len(rows), self._padded_outputs)
        count = len(sizes)
        self._library.grouped_gemm(
            (ctypes.c_void_p * count)(*[self._places[expert] for expert in experts]),
            (ctypes.c_int64 * count)(*sizes),
            ctypes.c_int64(count),
            ctypes.c_void_p(rows.data_ptr()),
            ctypes.c_void_p(output.data_ptr()),
            ctypes.c_int64(self._num_tiles),
            ctypes.c_int64(self._length),
            ctypes.c_int(torch.get_num_threads()),
        )
        return output if self._padded_outputs == self._num_outputs else output[:, : self._num_outputs]


def _huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy on huge pages where the system gives any: reading it misses fewer translations."""
    memory = mmap.mmap(-1, max(tensor.nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape).copy_(tensor)


def _cut(experts: Sequence[int], sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Cut groups into some of at most ``_MOST_ROWS`` rows."""
    parts = [
        (expert, min(_MOST_ROWS, size - start))
        for expert, size in zip(experts, sizes, strict=True)
        for start in range(0, size, _MOST_ROWS)
    ]
    return [expert for expert, _ in parts], [size for _, size in parts]
