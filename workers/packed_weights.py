"""Sixteen-bit weights on a CPU without sixteen-bit arithmetic: held as halves, multiplied in float32.

Few rows through a large weight cost the reading of the weight. On such a CPU torch's bfloat16 kernels read far
below the memory's speed, and slower with every further row; every small operation pays for two conversions. So a
bfloat16 model is rearranged once it is loaded: large weights are packed for FBGEMM's kernel (half-precision weights,
float32 rows), all others and all activations become float32. It computes the float32 function of the bfloat16
weights. `benchmarks/decode` measures what that brings.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

_SMALLEST_PACKED = 1 << 18
"""Weights of fewer elements stay in the caches, where the packed kernel's fixed cost would show."""
_LARGEST_HALF = torch.finfo(torch.float16).max
_linear_fp16 = torch.ops.quantized.linear_dynamic_fp16.default._op
"""What its overload calls: choosing the overload by name, and its look for fake arguments, cost as much as a small
layer."""


def packs_weights(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether models of ``dtype`` are packed on ``device``."""
    return (
        dtype == torch.bfloat16
        and device.type == "cpu"
        and "fbgemm" in torch.backends.quantized.supported_engines
        and not torch.cpu._is_avx512_bf16_supported()
        and not torch.cpu._is_amx_tile_supported()
    )


class PackedLinear(nn.Module):
    """A linear layer [N, I] to [N, O] in float32 of a bfloat16 weight [O, I].

    Packed values are exact for magnitudes from 2^-14, and within 2^-25 below. Weights that are small, or hold values
    beyond a half's range, are kept as float32.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        wide = weight.float()
        bias = None if bias is None else bias.float()
        self._packed: Any = None
        if wide.numel() >= _SMALLEST_PACKED and wide.abs().max() <= _LARGEST_HALF:
            self._packed = torch.ops.quantized.linear_prepack_fp16(wide, bias)
        else:
            self._wide, self._bias = wide, bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows`` times the weight's transpose, plus the bias."""
        if self._packed is None:
            return linear(rows, self._wide, self._bias)
        return _linear_fp16(rows, self._packed)


def pack_dense(model: nn.Module, expert_modules: Collection[nn.Module], routers: Collection[nn.Module]) -> None:
    """Rearrange all of ``model`` but the weights of ``expert_modules``; it then computes in float32.

    Embeddings stay as they are, since a step reads few of their rows. ``routers`` are only widened: they are small, and
    their code reads their weights in ways of its own.
    """
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
