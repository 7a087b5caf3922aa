"""Sixteen-bit weights on a CPU: held in sixteen bits, multiplied in float32.

Few rows through a large weight cost the reading of the weight. torch's bfloat16 kernels read far below the memory's
speed, even where the processor has bfloat16 instructions; without them every small operation pays for two conversions
besides. So a bfloat16 model is rearranged once it is loaded: large weights are packed for a kernel of sixteen-bit
weights and float32 rows, all others and all activations become float32. That kernel is our own where a compiler is at
hand (`kernels/fused_moe`), else FBGEMM's, whose weights are halves. The model computes the float32 function of its
bfloat16 weights. `benchmarks/decode` and `benchmarks/packed_layers` measure what that brings, and what it costs where
rows are many.

Shapes: N rows, E experts, O outputs, I inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from ..kernels.fused_moe import TiledWeights, kernel

logger = logging.getLogger(__name__)

_SMALLEST_PACKED = 1 << 18
"""Weights of fewer elements stay in the caches, where the packed kernel's fixed cost would show."""
_LARGEST_HALF = torch.finfo(torch.float16).max
_linear_fp16 = torch.ops.quantized.linear_dynamic_fp16.default._op
"""What its overload calls: choosing the overload by name, and its look for fake arguments, cost as much as a small
layer."""


def packs_weights(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether models of ``dtype`` are packed on ``device``.

    Dot products of bfloat16 (AVX512-BF16) do not help torch's kernels to the memory's speed. With tiles (AMX) torch's
    bfloat16 stays in place: many rows then cost a fraction of float32 arithmetic.
    """
    return (
        dtype == torch.bfloat16
        and device.type == "cpu"
        and "fbgemm" in torch.backends.quantized.supported_engines
        and not torch.cpu._is_amx_tile_supported()
    )


class PackedLinear(nn.Module):
    """A linear layer [.., I] to [.., O] in float32 of a bfloat16 weight [O, I].

    Weights that are small are kept as float32. FBGEMM's are exact for magnitudes from 2^-14 and within 2^-25 below;
    with values beyond a half's range they are kept as float32.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._bias = None if bias is None else bias.float()
        self._tiled: TiledWeights | None = None
        self._packed: Any = None
        library = kernel()
        if weight.numel() >= _SMALLEST_PACKED and library is not None:
            self._tiled = TiledWeights(library, weight[None])
            return
        wide = weight.float()
        if wide.numel() >= _SMALLEST_PACKED and wide.abs().max() <= _LARGEST_HALF:
            self._packed = torch.ops.quantized.linear_prepack_fp16(wide, self._bias)
        else:
            self._wide = wide

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return the weight [O, I] as it is multiplied, and the bias if there is one, in float32."""
        assert self._tiled is None, "tiles are not turned back"
        wide = self._wide if self._packed is None else torch.ops.quantized.linear_unpack_fp16(self._packed)[0]
        return (wide,) if self._bias is None else (wide, self._bias)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows`` times the weight's transpose, plus the bias."""
        if self._tiled is not None:
            flat = rows.reshape(-1, rows.shape[-1])
            output = self._tiled.multiply(flat, [0], [len(flat)]).unflatten(0, rows.shape[:-1])
            return output if self._bias is None else output.add_(self._bias)
        if self._packed is None:
            return linear(rows, self._wide, self._bias)
        return _linear_fp16(rows, self._packed)


class TiledExperts:
    """The same linear layer of E experts, of bfloat16 weights [E, O, I] and biases [E, O], in float32.

    What moves of an expert are the tiles of its weight and its bias.
    """

    def __init__(self, library: CDLL, weights: torch.Tensor, biases: torch.Tensor | None) -> None:
        self.biases = None if biases is None else biases.float()
        self.tiled = TiledWeights(library, weights)

    def __call__(self, rows: torch.Tensor, experts: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Return [N, O]: the first ``sizes[0]`` of ``rows`` [N, I] by expert ``experts[0]``, and so on."""
        output = self.tiled.multiply(rows, experts, sizes)
        if self.biases is not None:
            output += self.biases[experts].repeat_interleave(torch.tensor(sizes), dim=0)
        return output

    def tensors(self, expert: int) -> tuple[torch.Tensor, ...]:
        """Return an expert's tiles, and its bias if it has one."""
        tiles = self.tiled.tiles[expert]
        return (tiles,) if self.biases is None else (tiles, self.biases[expert])

    def room(self) -> tuple[torch.Tensor, ...]:
        """Return memory for what `tensors` gives of one more expert."""
        tiles = self.tiled.room()
        return (tiles,) if self.biases is None else (tiles, torch.empty_like(self.biases[0]))

    def hold(self, experts: Sequence[int | tuple[torch.Tensor, ...]]) -> None:
        """Hold ``experts`` in that order: those that it held, by number, and others by their tensors."""
        found = [self.tensors(expert) if isinstance(expert, int) else expert for expert in experts]
        self.tiled.hold([tensors[0] for tensors in found])
        if self.biases is not None:
            self.biases = torch.stack([tensors[1] for tensors in found])


class PackedExperts:
    """That of FBGEMM's packed weights. They cannot be looked into: what moves of an expert is what they stand for."""

    def __init__(self, weights: torch.Tensor, biases: torch.Tensor | None) -> None:
        # Each call packs on one thread
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            each = [None] * len(weights) if biases is None else list(biases)
            self._layers = list(pool.map(PackedLinear, weights, each))

    def __call__(self, rows: torch.Tensor, experts: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Return [N, O]: the first ``sizes[0]`` of ``rows`` [N, I] by expert ``experts[0]``, and so on."""
        return each_alone([self._layers[expert].forward for expert in experts], rows, range(len(experts)), sizes)

    def tensors(self, expert: int) -> tuple[torch.Tensor, ...]:
        """Return an expert's weight, and its bias if it has one, unpacked."""
        return self._layers[expert].tensors()

    def room(self) -> tuple[torch.Tensor, ...]:
        """Return memory for what `tensors` gives of one more expert."""
        return tuple(torch.empty_like(tensor) for tensor in self.tensors(0))

    def hold(self, experts: Sequence[int | tuple[torch.Tensor, ...]]) -> None:
        """Hold ``experts`` in that order: those that it held, by number, and others by their tensors, to be packed."""
        self._layers = [
            self._layers[expert] if isinstance(expert, int) else PackedLinear(expert[0], (*expert, None)[1])
            for expert in experts
        ]


def packed_experts(weights: torch.Tensor, biases: torch.Tensor | None) -> TiledExperts | PackedExperts:
    """Return the experts of bfloat16 ``weights`` [E, O, I] and ``biases`` [E, O] for the kernel that is at hand."""
    library = kernel()
    return PackedExperts(weights, biases) if library is None else TiledExperts(library, weights, biases)


def each_alone(
    layers: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    rows: torch.Tensor,
    experts: Sequence[int],
    sizes: Sequence[int],
) -> torch.Tensor:
    """Return [N, O]: each expert's rows, ``sizes`` of them in turn, by its layer."""
    results = [layers[expert](part) for expert, part in zip(experts, rows.split(sizes), strict=True)]
    return torch.cat(results) if len(results) > 1 else results[0]


def pack_dense(model: nn.Module, expert_modules: Collection[nn.Module], routers: Collection[nn.Module]) -> None:
    """Rearrange all of ``model`` but the weights of ``expert_modules``; it then computes in float32.

    Embeddings stay as they are, since a step reads few of their rows. ``routers`` are only widened: they are small, and
    their code reads their weights in ways of its own.
    """
    library = "FBGEMM's kernel" if kernel() is None else "the compiled kernel"
    logger.info("bfloat16 weights are packed, and multiplied in float32 by %s", library)
    kept = {part for module in (*expert_modules, *routers) for part in module.modules()}
    for module in [module for module in model.modules() if module not in kept]:
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight.numel() >= _SMALLEST_PACKED and child not in kept:
                setattr(module, name, PackedLinear(child.weight, child.bias))
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(_widen)
        elif module not in expert_modules:
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                if tensor.dtype == torch.bfloat16:
                    tensor.data = tensor.data.float()


def _widen(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.float()
