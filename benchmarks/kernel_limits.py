"""What Triton's kernels take on GPUs that need not be there: registers, spills, shared memory.

`python -m penstock.benchmarks.kernel_limits` compiles each kernel as its caller would launch it, for the shapes of real
models, for Ampere, Hopper and Blackwell, down to machine code, and launches none. ``--quick`` takes a few of them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .harness import Measurement, Options, Row, Target, run

ARCHITECTURES = {80: "Ampere", 90: "Hopper", 100: "Blackwell"}
_SHARED_BYTES = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
"""Of a processor; its programs share it, and each takes 1 KiB besides."""
_REGISTERS = 1 << 16
"""Of a processor, in whole eights for each thread of its programs."""
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")

Case = tuple[str, Callable[[], Any]]


class Compiler:
    """Stands where Triton looks for a GPU: says which it is, and takes what was compiled instead of launching it."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        self._target = GPUTarget("cuda", architecture, 32)
        driver.set_active(self)
        launch = JITFunction.run
        self.kernels: list[tuple[str, Any]] = []

        def compile_only(function: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            kernel = launch(function, *arguments, grid=grid, warmup=True, **options)
            self.kernels.append((function.fn.__name__.strip("_"), kernel))
            return kernel

        self._launch = launch
        JITFunction.run = compile_only

    def close(self) -> None:
        """Let kernels be launched again."""
        from triton.runtime.jit import JITFunction

        JITFunction.run = self._launch

    def get_current_target(self) -> Any:
        """Return the GPU; this and the others are what Triton asks."""
        return self._target

    def get_current_device(self) -> int:
        """Return a number of its own for each: kernels are remembered by it."""
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        """Return none that is used."""
        return 0


def _meta(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _experts(kind: str, num_rows: int, dtype: torch.dtype, *, moves: bool = False) -> Case:
    from ..kernels.expert_weights import ExpertWeights
    from ..kernels.grouped_experts import Gate, grouped_experts

    is_oss = kind in ("transposed", "mxfp4")
    hidden_size, inner_size, num_experts, top_k = (2880, 2880, 32, 4) if is_oss else (2048, 768, 128, 8)

    def weights(outputs: int, inputs: int) -> ExpertWeights:
        biases = _meta(num_experts, outputs, dtype=dtype) if is_oss else None
        if kind == "fp8":
            scales = _meta(num_experts, -(-outputs // 128), -(-inputs // 128), dtype=torch.float32)
            values = _meta(num_experts, outputs, inputs, dtype=torch.float8_e4m3fn)
            return ExpertWeights.block_fp8(values, scales, (128, 128), biases)
        if kind == "mxfp4":
            scales = _meta(num_experts, outputs, inputs // 32, dtype=torch.uint8)
            return ExpertWeights.mxfp4(_meta(*scales.shape, 16, dtype=torch.uint8), scales, biases)
        if kind == "transposed":
            return ExpertWeights.plain(_meta(num_experts, inputs, outputs, dtype=dtype).transpose(1, 2), biases)
        return ExpertWeights.plain(_meta(num_experts, outputs, inputs, dtype=dtype), biases)

    def call() -> None:
        grouped_experts(
            weights(2 * inner_size, hidden_size),
            weights(hidden_size, inner_size),
            Gate("clamped", interleaved=True) if is_oss else Gate(),
            _meta(num_rows, hidden_size, dtype=dtype),
            _meta(num_rows, top_k),
            _meta(num_rows, top_k, dtype=torch.float32),
            slots=_meta(num_experts, dtype=torch.int32) if moves else None,
        )

    return f"{kind} {str(dtype).removeprefix('torch.')}, {num_rows} rows{', in slots' * moves}", call


def _route(model: str, name: str, score: str | None = None, *, owners: bool = False, **rules: Any) -> Case:
    from ..kernels.expert_routing import route
    from ..kernels.routing_rules import GroupLimit, KeptExperts, Router

    num_experts, router = {
        "Qwen3": (128, Router(8, dtype=torch.bfloat16)),
        "DeepSeek-V2": (160, Router(6, normalise=False, scale=16.0, limit=GroupLimit(8, 3, 1, 0.0))),
        "DeepSeek-V3": (256, Router(8, sigmoid=True, scale=2.5, limit=GroupLimit(8, 4, 2))),
    }[model]
    logits = _meta(8, num_experts, dtype=router.dtype)
    bias = _meta(num_experts, dtype=torch.float32) if router.sigmoid else None
    flags, reach = _meta(8, dtype=torch.bool), _meta(8, dtype=torch.float32)
    budget = None
    if score is not None:
        owner = _meta(num_experts) if owners else None
        budget = KeptExperts(score=score, num_groups=1, budgeted=flags, reach=reach, owner=owner, **rules)
    return f"{model}, {name}", lambda: route(logits, router, bias, budget, flags)


def _pack() -> None:
    from ..kernels.load_counts import count_loads
    from ..kernels.rank_packing import add_from_ranks, pack_for_ranks, unpack_from_ranks

    hidden, weights = _meta(8, 2048, dtype=torch.bfloat16), _meta(8, 8, dtype=torch.float32)
    packed = pack_for_ranks(hidden, _meta(8, 8), weights, _meta(129), _meta(129), _meta(8), 0)
    unpack_from_ranks(packed.rows, _meta(8), 0)
    add_from_ranks(_meta(8, 8, 2048, dtype=torch.bfloat16), packed.places)
    count_loads(_meta(130), _meta(8, 8), _meta(64, 8), 16)


def _choose() -> None:
    from ..kernels.kv_moves import AcceptedRows, Pools, move_accepted
    from ..kernels.token_choice import choose_tokens
    from ..kernels.tree_acceptance import DraftTrees, accept_trees

    tokens = choose_tokens(_meta(8, 151936, dtype=torch.float32), _meta(8, 2), _meta(8), _meta(8))
    accept_trees(DraftTrees(_meta(8), _meta(8), _meta(1), _meta(1), _meta(1), _meta(1), 8), tokens)
    move_accepted(Pools(_meta(96, 2)), AcceptedRows(_meta(1, 8), _meta(1), _meta(1), _meta(1, 16), 16))


def _cases(architecture: int, *, quick: bool) -> Iterator[Case]:
    bf16, f32 = torch.bfloat16, torch.float32
    if quick:
        yield _experts("mxfp4" if architecture == 100 else "fp8" if architecture == 80 else "plain", 1, bf16)
    else:
        for num_rows in (1, 20, 64):
            for kind in ("plain", "transposed", "fp8", "mxfp4"):
                yield _experts(kind, num_rows, bf16)
            yield _experts("plain", num_rows, f32)
        yield _experts("plain", 8, bf16, moves=True)
    if architecture == 90 or not quick:
        for model in ("Qwen3", "DeepSeek-V3") if quick else ("Qwen3", "DeepSeek-V2", "DeepSeek-V3"):
            yield _route(model, "without a budget")
            yield _route(model, "nearly even between ranks", "squared", num_experts=_meta(1), owners=True, balance=0.5)
            if not quick:
                yield _route(model, "by survival", "survival", num_experts=_meta(1))
                yield _route(model, "by coverage", "squared", coverage=0.9)
                yield _route(model, "truncated", "survival", num_experts=_meta(1), truncates=True)
        yield "8 ranks", _pack
        yield "8 rows", _choose


def resources(kernel: Any) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes that it spills, of a compiled kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    match = _RESOURCES.search(found)
    assert match is not None, found
    return int(match[1]), int(match[2]) + int(match[3])


def programs_of(kernel: Any, architecture: int, registers: int) -> int:
    """Return how many programs of a compiled kernel share a processor's registers and memory."""
    by_registers = _REGISTERS // (-(-registers // 8) * 8 * 32 * kernel.metadata.num_warps)
    return int(min(by_registers, _SHARED_BYTES[architecture] // (kernel.metadata.shared + 1024), 32))


def measure(options: Options) -> Measurement:
    """Compile for each architecture."""
    rows: list[Row] = []
    for architecture in options.given.architectures:
        compiler = Compiler(architecture)
        try:
            for case, call in _cases(architecture, quick=options.quick):
                compiler.kernels.clear()
                call()
                for name, kernel in compiler.kernels:
                    registers, spilled = resources(kernel)
                    rows.append(
                        {
                            "architecture": f"sm_{architecture}",
                            "kernel": name,
                            "case": case,
                            "registers": registers,
                            "spilled_bytes": spilled,
                            "shared_bytes": kernel.metadata.shared,
                            "warps": kernel.metadata.num_warps,
                            "programs": programs_of(kernel, architecture, registers),
                        }
                    )
        finally:
            compiler.close()

    def over(name: str) -> list[float]:
        return [float(row[name]) for row in rows]  # type: ignore[arg-type]

    targets = [
        Target("bytes spilled by any kernel", max(over("spilled_bytes")), at_most=0),
        Target("programs that share a processor's registers and memory", min(over("programs")), at_least=2),
    ]
    return Measurement(rows, targets, "as named", 1)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--architectures", type=int, nargs="+", choices=ARCHITECTURES, default=[*ARCHITECTURES], metavar="N",
        help=f"compute capabilities, of {', '.join(f'{n} ({name})' for n, name in ARCHITECTURES.items())}",
    )  # fmt: skip


def main() -> int:
    """Run from the command line; refuse where Triton does not compile."""
    try:
        from triton import knobs
    except ImportError:
        print("kernel_limits: Triton is not installed; it comes with the dev extra on Linux", file=sys.stderr)
        return 2
    if knobs.runtime.interpret:
        print("kernel_limits: TRITON_INTERPRET is set, so that nothing is compiled; unset it", file=sys.stderr)
        return 2
    return run("kernel_limits", measure, add_options=_options)


if __name__ == "__main__":
    sys.exit(main())
