"""How a layer of experts is cut into programs: a table by shape, and a rule for shapes that it does not hold.

Decoding reads weights and computes little, so a cut is good if enough bytes are under way. An H100 needs about 3 TB/s x
0.8 us = 2.5 MB, 20 KB on each of its 132 processors. A program keeps ``num_stages - 1`` tiles of ``outputs`` x
``inputs`` weights in flight: 64 x 128 bf16 weights in 4 stages are 48 KB, and two programs share a processor. So what
matters is that one row gives every processor work: its K experts must make well over 132 programs of each projection.
The first one's tiles are therefore narrow (64 weights' rows: 32 gates and their 32 ups), and the second one's inputs
are cut into ``splits`` where experts are few, which costs nothing, since the sums over splits are taken together with
those over experts. Tiles of 64 rows are the least that Hopper's and Blackwell's matrix instructions take.

A row's sums must not depend on the rows beside it: nothing that changes their order depends on the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

_ENOUGH_PROGRAMS = 192
"""Of one row, over all its experts: each processor of an H100 has one, and half have two."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """The cut of one projection."""

    outputs: int
    """Rows of the weights in a tile."""
    inputs: int
    """Their columns in a step."""
    splits: int = 1
    """Parts of the inputs that are summed by programs of their own."""
    num_warps: int = 4
    num_stages: int = 4

    def stages(self, num_rows: int) -> int:
        """Return how many steps are under way for ``num_rows``: those take room too, and two programs must have it."""
        return min(self.num_stages, 3) if num_rows > 32 else self.num_stages


@dataclass(frozen=True, slots=True)
class LayerTiles:
    """The cuts of a layer's two projections."""

    up: Tiles
    down: Tiles


MEASURED: dict[tuple[int, int, int, float], LayerTiles] = {}
"""By (hidden, intermediate, experts per row, bytes of a weight): what `benchmarks/gpu_experts --tune` found best."""


def layer_tiles(
    hidden_size: int, inner_size: int, top_k: int, weight_bytes: float, *, scale_inputs: int | None = None
) -> LayerTiles:
    """Return the cut for experts of this shape; ``scale_inputs``: inputs that share a factor, in block fp8."""
    found = MEASURED.get((hidden_size, inner_size, top_k, weight_bytes))
    if found is not None and (scale_inputs is None or max(found.up.inputs, found.down.inputs) <= scale_inputs):
        return found
    step = 32 if weight_bytes == 4 else 128
    up_step, down_step = (max(32, min(step, _power_of_two(size))) for size in (hidden_size, inner_size))
    if scale_inputs is not None:
        up_step, down_step = min(up_step, scale_inputs), min(down_step, scale_inputs)
    splits = 1
    while top_k * -(-hidden_size // 64) * splits < _ENOUGH_PROGRAMS and inner_size >= 8 * splits * down_step:
        splits *= 2
    # f32 is multiplied by common instructions, which hold a step's rows and sums in registers
    warps, stages = (8, 5) if weight_bytes == 4 else (4, 4 if weight_bytes == 2 else 6)
    return LayerTiles(Tiles(64, up_step, 1, warps, stages), Tiles(64, down_step, splits, warps, stages))


def block_rows(num_rows: int) -> int:
    """Return how many of an expert's rows a program takes: all of them up to 64, so that it reads its weights once."""
    return 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64


def _power_of_two(number: int) -> int:
    """Return the least power of two from ``number`` up."""
    return 1 << (number - 1).bit_length()
