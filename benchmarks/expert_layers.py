"""Layers of experts with the shapes of real models, and rows routed to them.

Shapes: T rows, H hidden, K experts per row, E experts, F expert intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.expert_weights import ExpertWeights
from ..kernels.grouped_experts import Gate

_FP8_BLOCK = (128, 128)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One MoE layer of a model."""

    name: str
    hidden_size: int
    inner_size: int
    num_experts: int
    top_k: int
    stored_as: str | None = None
    """What the published checkpoint stores besides, or instead of, bf16: fp8 or mxfp4."""

    @property
    def is_oss(self) -> bool:
        """Whether it has GPT-OSS's layout, biases and gate."""
        return self.stored_as == "mxfp4"


MODELS = (
    LayerShape("Qwen3-30B-A3B", 2048, 768, 128, 8, "fp8"),
    LayerShape("Mixtral-8x7B", 4096, 14336, 8, 2),
    LayerShape("GPT-OSS-20B", 2880, 2880, 32, 4, "mxfp4"),
    LayerShape("OLMoE-1B-7B", 2048, 1024, 64, 8),
    LayerShape("DeepSeek-V2-Lite", 2048, 1408, 64, 6),
)


def module_of(shape: LayerShape, device: torch.device) -> Any:
    """Return transformers' experts module with random bf16 weights."""
    from transformers import GptOssConfig, Qwen3MoeConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    sizes: dict[str, Any] = {"hidden_size": shape.hidden_size, "num_experts_per_tok": shape.top_k}
    with torch.device("meta"):
        if shape.is_oss:
            module: Any = GptOssExperts(
                GptOssConfig(intermediate_size=shape.inner_size, num_local_experts=shape.num_experts, **sizes)
            )
        else:
            module = Qwen3MoeExperts(
                Qwen3MoeConfig(moe_intermediate_size=shape.inner_size, num_experts=shape.num_experts, **sizes)
            )
    module = module.to(torch.bfloat16).to_empty(device=device)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.03)
        parameter.requires_grad_(False)
    return module


def stored(shape: LayerShape, device: torch.device) -> tuple[ExpertWeights, ExpertWeights]:
    """Return both projections as the checkpoint stores them, with random numbers."""
    up, down = (
        _random(shape, outputs, inputs, device)
        for outputs, inputs in ((2 * shape.inner_size, shape.hidden_size), (shape.hidden_size, shape.inner_size))
    )
    return up, down


def parts_of(shape: LayerShape, device: torch.device, *, as_stored: bool) -> tuple[ExpertWeights, ExpertWeights, Gate]:
    """Return a layer as the kernels take it, in bf16 or as the checkpoint stores it."""
    from ..workers.gpu_experts import fused

    if as_stored:
        return *stored(shape, device), gate_of(shape)
    return fused(module_of(shape, device)).args


def gate_of(shape: LayerShape) -> Gate:
    """Return what its experts make of their gates and ups."""
    return Gate("clamped", interleaved=True) if shape.is_oss else Gate()


def _random(shape: LayerShape, outputs: int, inputs: int, device: torch.device) -> ExpertWeights:
    experts = shape.num_experts
    if shape.stored_as == "fp8":
        values = torch.empty(experts, outputs, inputs, dtype=torch.float8_e4m3fn, device=device)
        for expert in range(experts):
            values[expert] = (torch.randn(outputs, inputs, device=device) * 50).to(torch.float8_e4m3fn)
        blocks = (experts, -(-outputs // _FP8_BLOCK[0]), -(-inputs // _FP8_BLOCK[1]))
        return ExpertWeights.block_fp8(values, torch.full(blocks, 6e-4, device=device), _FP8_BLOCK)
    assert shape.stored_as == "mxfp4", "one of the two"
    blocks4 = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, device=device)
    scales = torch.full(blocks4.shape[:3], 121, dtype=torch.uint8, device=device)
    biases = torch.randn(experts, outputs, dtype=torch.bfloat16, device=device) * 0.03
    return ExpertWeights.mxfp4(blocks4, scales, biases)


@dataclass(frozen=True, slots=True)
class Draw:
    """Rows of one step, and what they cost at least."""

    hidden: torch.Tensor
    """[T, H]"""
    expert_ids: torch.Tensor
    """[T, K]"""
    weights: torch.Tensor
    """[T, K] f32"""
    num_active: int
    """Distinct experts."""


def draw(shape: LayerShape, num_rows: int, routing: str, device: torch.device, seed: int) -> Draw:
    """Return rows of one step; ``routing`` is uniform or skewed.

    Skewed: a row's logits are the sum of three normal numbers of an expert, its popularity in the layer, its fit to the
    text that all rows of the step come from, and its fit to the row, so that neighbours share experts.
    """
    of_layer = torch.Generator().manual_seed(shape.num_experts)
    of_step = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, shape.num_experts, generator=of_step)
    if routing == "skewed":
        logits += torch.randn(shape.num_experts, generator=of_layer) + torch.randn(shape.num_experts, generator=of_step)
    ids = logits.topk(shape.top_k).indices
    hidden = torch.randn(num_rows, shape.hidden_size, generator=of_step).to(device, torch.bfloat16)
    weights = torch.rand(ids.shape, generator=of_step)
    weights /= weights.sum(dim=1, keepdim=True)
    return Draw(hidden, ids.to(device), weights.to(device), len(ids.unique()))
