"""What attention over the KV pool's blocks takes on a Hopper GPU that need not be there: registers, spills, memory.

`python -m penstock.benchmarks.attention_limits` compiles it as replayed steps call it, for the heads of real models,
down to machine code, and launches nothing. It needs a build of torch without CUDA. ``--quick`` takes a few shapes;
``--sources FOLDER`` writes there what torch generates, for each shape its kernel in Triton. Rows with a ``tile`` are of
latents cut in other ways, of rows x slots.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch._subclasses import FakeTensorMode

from ..workers import page_attention
from ..workers.context_pages import ContextPages
from ..workers.latent_attention import Absorbed
from ..workers.page_attention import attend
from .absent_gpu import ARCHITECTURE, AbsentGpu, Kernel
from .harness import Measurement, Options, Row, Target, run
from .kernel_limits import resources

POOL_BLOCKS = 4096
REQUESTS = 4
WIDEST = 256
"""Contexts, in blocks."""


class Heads(NamedTuple):
    """What a model's attention is made of."""

    model: str
    num_heads: int
    num_kv_heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype = torch.bfloat16
    sinks: bool = False
    latent_width: int = 0
    """Of latent attention; the rest of a key is kept beside it."""
    position_width: int = 64


_HEADS = (
    Heads("Qwen3-30B-A3B", 32, 4, 128, 128),
    Heads("gpt-oss-120b", 64, 8, 64, 64, sinks=True),
    Heads("Qwen3-235B-A22B", 64, 4, 128, 128),
    Heads("Qwen2-57B-A14B", 28, 4, 128, 128),
    Heads("Mixtral-8x7B", 32, 8, 128, 128),
    Heads("OLMoE-1B-7B", 16, 16, 128, 128),
    Heads("MiMo-V2-Flash", 64, 4, 192, 128, sinks=True),
    Heads("Qwen3-30B-A3B", 32, 4, 128, 128, dtype=torch.float32),
    Heads("heads of 256", 64, 4, 256, 256, dtype=torch.float32),
    Heads("heads of 512", 16, 2, 512, 512),
    Heads("DeepSeek-V2-Lite", 16, 1, 192, 128, latent_width=512),
    Heads("DeepSeek-V3", 128, 1, 192, 128, latent_width=512),
    Heads("GLM-4.7-Flash", 20, 1, 256, 256, latent_width=512),
    Heads("DeepSeek-V2-Lite", 16, 1, 192, 128, dtype=torch.float32, latent_width=512),
)
_LATENT = next(heads for heads in _HEADS if heads.latent_width)
_TILES = tuple(
    {"BLOCK_M": rows, "BLOCK_N": slots, "num_warps": warps, "num_stages": stages, "SPLIT_KV": 33}
    for rows, slots, warps, stages in (
        (16, 16, 4, 1),
        (16, 16, 4, 2),
        (16, 16, 8, 2),
        (16, 16, 4, 3),
        (16, 32, 4, 1),
        (16, 32, 8, 2),
        (32, 16, 8, 1),
        (32, 16, 8, 2),
        (32, 32, 8, 1),
        (64, 16, 8, 1),
        (64, 16, 8, 2),
        (64, 32, 8, 1),
    )
)
"""What latents could be cut into; `latent_options` chooses two of them."""
SMALL = {
    "decoding": Heads("small, decoding", 4, 2, 16, 16, torch.float32, sinks=True),
    "general": Heads("small, general", 3, 1, 16, 16, torch.float32, sinks=True),
    "latent": Heads("small, latent", 4, 1, 16, 12, torch.float32, sinks=True, latent_width=16, position_width=8),
}
"""Of each of torch's two kernels, and of latents, what can be interpreted."""


def _cases(*, quick: bool) -> Iterator[tuple[Heads, int, int]]:
    """Yield heads, rows of a request and slots of a block."""
    if quick:
        yield _HEADS[1], 8, 16
        yield _HEADS[3], 1, 16
        yield _HEADS[8], 8, 64
        yield _HEADS[11], 8, 16
        for heads in SMALL.values():
            yield heads, 4, 16
        return
    for heads in _HEADS:
        for num_rows in (1, 2, 4, 8):
            for block_size in (16, 64):
                yield heads, num_rows, block_size


def _attend(heads: Heads, num_rows: int, block_size: int) -> torch.Tensor:
    """Attend as a layer of a replayed step does."""
    with FakeTensorMode(), torch.inference_mode():
        numbers = partial(torch.zeros, dtype=torch.int64, device="cuda")
        states = partial(torch.zeros, dtype=heads.dtype, device="cuda")
        pages = ContextPages(
            tables=numbers(REQUESTS, WIDEST),
            committed=numbers(REQUESTS),
            num_rows=numbers(REQUESTS),
            positions=numbers(REQUESTS, num_rows),
            own=numbers(REQUESTS, num_rows, num_rows).bool(),
            block_size=block_size,
            num_pool_blocks=POOL_BLOCKS,
            most_blocks=WIDEST,
        )
        query = states(REQUESTS, num_rows, heads.num_heads, heads.key_width).transpose(1, 2)
        slots = POOL_BLOCKS * block_size
        sinks = states(heads.num_heads) if heads.sinks else None
        absorbed: Absorbed | None = None
        pools: tuple[torch.Tensor, ...]
        if heads.latent_width:
            both = states(slots, 1, heads.latent_width + heads.position_width)
            pools = both, both.narrow(2, 0, heads.latent_width)
            widths = heads.key_width - heads.position_width, heads.value_width
            weight = states(heads.num_heads, sum(widths), heads.latent_width)
            absorbed = Absorbed(*weight.split(widths, dim=1))
        else:
            pools = tuple(states(slots, heads.num_kv_heads, width) for width in (heads.key_width, heads.value_width))
        keys, values = (pool.transpose(0, 1).unsqueeze(0) for pool in pools)
        return attend(query, keys, values, pages.mask(None), sinks, heads.key_width**-0.5, absorbed)


def _row(heads: Heads, num_rows: int, block_size: int, kernel: Kernel) -> Row:
    registers, spilled = resources(kernel.compiled)
    return {
        "architecture": f"sm_{ARCHITECTURE}",
        "model": heads.model,
        "dtype": str(heads.dtype).removeprefix("torch."),
        "rows": num_rows,
        "block_size": block_size,
        "kernel": kernel.name,
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": kernel.compiled.metadata.shared,
        "warps": kernel.compiled.metadata.num_warps,
        "stages": kernel.compiled.metadata.num_stages,
    }


def measure(options: Options) -> Measurement:
    """Compile for Hopper."""
    rows: list[Row] = []
    tried: list[Row] = []
    gpu = AbsentGpu()
    try:
        for heads, num_rows, block_size in _cases(quick=options.quick):
            kernels = gpu.kernels(partial(_attend, heads, num_rows, block_size))
            if options.given.sources is not None:
                name = f"{heads.model}, {num_rows} rows, blocks of {block_size}.py"
                attends = next(kernel for kernel in kernels if "triton_tem" in kernel.name)
                (options.given.sources / name).write_text(attends.source, encoding="utf-8")
            rows += [_row(heads, num_rows, block_size, kernel) for kernel in kernels]
        for options_tried in () if options.quick else _TILES:
            with patch.object(page_attention, "latent_options", lambda tile=options_tried, **_: tile):
                kernels = gpu.kernels(partial(_attend, _LATENT, 4, 32))
            attends = next(kernel for kernel in kernels if "triton_tem" in kernel.name)
            tile = f"{options_tried['BLOCK_M']} x {options_tried['BLOCK_N']}"
            tried.append({**_row(_LATENT, 4, 32, attends), "tile": tile})
    finally:
        gpu.close()
    spilled_bytes = max(int(row["spilled_bytes"] or 0) for row in rows)
    latent = {heads.model for heads in (*_HEADS, *SMALL.values()) if heads.latent_width}
    shared_bytes = max(int(row["shared_bytes"] or 0) for row in rows if row["model"] not in latent)
    shared_by_latents = max(int(row["shared_bytes"] or 0) for row in rows if row["model"] in latent)
    targets = [
        Target("bytes spilled by any kernel", spilled_bytes, at_most=0),
        Target("bytes of shared memory of any kernel, but of latents'", shared_bytes, at_most=99 << 10),
        Target("bytes of shared memory of any kernel of latents'", shared_by_latents, at_most=227 << 10),
    ]
    return Measurement([*rows, *tried], targets, "as named", 1)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sources", type=Path, metavar="FOLDER", help="write the kernels' sources to FOLDER")


def main() -> int:
    """Run from the command line; refuse where nothing can be compiled for a GPU that is not there."""
    try:
        from triton import knobs
    except ImportError:
        print("attention_limits: Triton is not installed; it comes with the dev extra on Linux", file=sys.stderr)
        return 2
    if knobs.runtime.interpret:
        print("attention_limits: TRITON_INTERPRET is set, so that nothing is compiled; unset it", file=sys.stderr)
        return 2
    if torch.version.cuda is not None:
        print("attention_limits: this build of torch asks a GPU's driver; use one without CUDA", file=sys.stderr)
        return 2
    return run("attention_limits", measure, add_options=_options)


if __name__ == "__main__":
    sys.exit(main())
