"""Better cuts of a layer of experts: which can be good at all, which of them compile well, and which is fastest.

Most are ruled out before anything runs. By arithmetic (`candidates`): one row must give every processor a program. By
the compiler (`Compiled`), which needs no GPU and works in as many processes as there are cores: at 1, 32 and 64 rows no
register is spilled, and two programs share a processor. What is left is timed, a projection after the other, while the
next layers' are compiled. Compiled kernels lie in Triton's cache, so that timing does not wait for them.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.expert_tiles import LayerTiles, Tiles, layer_tiles
from .expert_layers import LayerShape

if TYPE_CHECKING:
    from .kernel_limits import Compiler

PARTS = ("up", "down")
_OUTPUTS, _INPUTS, _SPLITS = (32, 64, 128), (64, 128, 256), (1, 2, 4)
_WARPS, _STAGES = (4, 8), (3, 4, 6)
_SIZES = (64, 32, 8, 1)
"""Rows: what takes most comes first. A program takes 64, 32, 16 and 16 of them; the last two are timed."""
_FP8_INPUTS = 128
"""That share a factor."""
_BYTES = {None: 2.0, "fp8": 1.0, "mxfp4": 0.5}


@dataclass(frozen=True, slots=True)
class Layer:
    """What is cut."""

    shape: LayerShape
    as_stored: bool

    @property
    def key(self) -> tuple[int, int, int, float]:
        """Of the table."""
        stored_as = self.shape.stored_as if self.as_stored else None
        return self.shape.hidden_size, self.shape.inner_size, self.shape.top_k, _BYTES[stored_as]

    @property
    def scale_inputs(self) -> int | None:
        """As `layer_tiles` takes it."""
        return _FP8_INPUTS if self.as_stored and self.shape.stored_as == "fp8" else None

    def tiles(self) -> LayerTiles:
        """Return the cuts that it has by now."""
        return layer_tiles(*self.key, scale_inputs=self.scale_inputs)


def candidates(layer: Layer, part: str, num_processors: int) -> Iterator[Tiles]:
    """Yield the cuts of a projection that give each processor a program of one row, its present cut apart."""
    present: Tiles = getattr(layer.tiles(), part)
    hidden_size, inner_size, top_k, _ = layer.key
    num_outputs, num_inputs = (2 * inner_size, hidden_size) if part == "up" else (hidden_size, inner_size)
    splits = (1,) if part == "up" else _SPLITS
    for outputs, inputs, split, warps, stages in itertools.product(_OUTPUTS, _INPUTS, splits, _WARPS, _STAGES):
        if layer.scale_inputs is not None and inputs > layer.scale_inputs:
            continue
        if split * inputs > max(num_inputs, inputs):  # some programs would have nothing to sum
            continue
        if top_k * -(-num_outputs // outputs) * split < num_processors:
            continue
        if (cut := Tiles(outputs, inputs, split, warps, stages)) != present:
            yield cut


class Compiled:
    """Compiles cuts in processes of its own, for GPUs of one ``architecture``: 90 for Hopper."""

    def __init__(self, architecture: int, num_processes: int | None = None) -> None:
        self._architecture = architecture
        self._pool = ProcessPoolExecutor(
            num_processes or min(len(os.sched_getaffinity(0)), 16), mp_context=multiprocessing.get_context("spawn")
        )

    def close(self) -> None:
        """End the processes, and drop what they have not begun."""
        self._pool.shutdown(cancel_futures=True)

    def fit(self, layer: Layer, part: str, cuts: Sequence[Tiles]) -> Iterator[Tiles]:
        """Begin to compile ``cuts`` of a projection; the iterator waits for each, and leaves out what is not well."""
        judged = self._pool.map(partial(_is_fit, self._architecture, layer, part), cuts)
        return (cut for cut, is_fit in zip(cuts, judged, strict=True) if is_fit)


def _is_fit(architecture: int, layer: Layer, part: str, cut: Tiles) -> bool:
    from .expert_layers import parts_of
    from .kernel_limits import Compiler

    torch.set_num_threads(1)
    parts = parts_of(layer.shape, torch.device("meta"), as_stored=layer.as_stored)
    tiles = replace(layer.tiles(), **{part: cut})
    compiler = Compiler(architecture)
    try:
        return all(_fits(compiler, architecture, layer, part, parts, tiles, num_rows) for num_rows in _SIZES)
    except Exception:  # Triton has classes of its own for what it cannot compile
        return False
    finally:
        compiler.close()


def _fits(
    compiler: Compiler, architecture: int, layer: Layer, part: str, parts: Any, tiles: LayerTiles, num_rows: int
) -> bool:
    from ..kernels.grouped_experts import grouped_experts
    from .kernel_limits import programs_of, resources

    compiler.kernels.clear()
    empty = partial(torch.empty, num_rows, device="meta")
    top_k = layer.shape.top_k
    hidden, ids = empty(layer.shape.hidden_size, dtype=torch.bfloat16), empty(top_k, dtype=torch.int64)
    up, down, gate = parts
    grouped_experts(up, down, gate, hidden, ids, empty(top_k), tiles)
    kernel = [kernel for name, kernel in compiler.kernels if name == "product"][PARTS.index(part)]
    registers, spilled = resources(kernel)
    return not spilled and programs_of(kernel, architecture, registers) >= 2


def fastest(
    layer: Layer,
    cuts: Mapping[str, Iterable[Tiles]],
    seconds: Callable[[LayerTiles], float],
    is_over: Callable[[], bool] = lambda: False,
) -> tuple[LayerTiles, float]:
    """Return the best of ``cuts`` by projection and what it takes; of the second beside the best first.

    ``seconds`` may be infinite, for a cut that does not run. When the time ``is_over``, the best so far is returned.
    """
    best = layer.tiles()
    best_s = seconds(best)
    for part in PARTS:
        beside = best
        for cut in cuts[part]:
            if is_over():
                return best, best_s
            candidate = replace(beside, **{part: cut})
            if (candidate_s := seconds(candidate)) < best_s:
                best, best_s = candidate, candidate_s
    return best, best_s
