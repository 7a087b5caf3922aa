"""Quantised checkpoints, made of others by a quantiser of the tests' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from penstock.workers.checkpoint import SINGLE

# Neither divides 24, so that last blocks are not full, as in DeepSeek-V3's attention
BLOCK = (16, 10)
FP8 = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
Tensors = dict[str, torch.Tensor]


def quantize_fp8(
    weight: torch.Tensor, block: tuple[int, int] = BLOCK
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One matrix in float8, its blocks' factors, and what the two are worth."""
    m, n = weight.shape
    stored, worth = torch.empty(m, n, dtype=torch.float8_e4m3fn), torch.empty(m, n)
    factors = torch.empty(-(-m // block[0]), -(-n // block[1]))
    for i in range(factors.shape[0]):
        for j in range(factors.shape[1]):
            rows, columns = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            factors[i, j] = weight[rows, columns].abs().max() / 448
            stored[rows, columns] = (weight[rows, columns] / factors[i, j]).to(torch.float8_e4m3fn)
            worth[rows, columns] = stored[rows, columns].float() * factors[i, j]
    return stored, factors, worth


def quantize_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A stack of matrices [E, I, O] in 4 bits, their scales, and what the two are worth."""
    groups = weight.transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = torch.floor(torch.log2(groups.abs().amax(dim=-1))) - 2
    scaled = groups / 2 ** exponents[..., None]
    table = torch.tensor([*FP4, *(-value for value in FP4)])
    codes = (scaled[..., None] - table).abs().argmin(dim=-1)
    worth = (table[codes] * 2 ** exponents[..., None]).flatten(-2).transpose(1, 2).contiguous()
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8), (exponents + 127).to(torch.uint8), worth


def tensors_of(directory: Path) -> Tensors:
    return {key: tensor for file in sorted(directory.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def write(source: Path, target: Path, tensors: Tensors, **config: Any) -> Path:
    target.mkdir()
    raw = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(raw))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target / SINGLE, {"format": "pt"})
    return target


def fp8_of(source: Path, target: Path, block: tuple[int, int] = BLOCK) -> tuple[Path, Path]:
    """Quantise what DeepSeek does: every projection, but neither embeddings, head, routers nor norms."""
    stored, worth = {}, {}
    for key, tensor in tensors_of(source).items():
        if not key.endswith((".weight", "_proj")) or tensor.dim() < 2 or ".layers." not in key or ".gate." in key:
            stored[key] = worth[key] = tensor
            continue
        parts = [quantize_fp8(matrix, block) for matrix in tensor.reshape(-1, *tensor.shape[-2:])]
        lead = tensor.shape[:-2]
        stored[key], stored[f"{key}_scale_inv"], worth[key] = (
            torch.stack([part[i] for part in parts]).view(*lead, *parts[0][i].shape) for i in range(3)
        )
    return (
        write(source, target / "fp8", stored, quantization_config={**FP8, "weight_block_size": list(block)}),
        write(source, target / "worth", worth),
    )


def mxfp4_of(source: Path, target: Path) -> tuple[Path, Path]:
    """Quantise what GPT-OSS does: the experts' two projections."""
    stored, worth = {}, {}
    for key, tensor in tensors_of(source).items():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[f"{key}_blocks"], stored[f"{key}_scales"], worth[key] = quantize_mxfp4(tensor)
        else:
            stored[key] = worth[key] = tensor
    return (
        write(source, target / "mxfp4", stored, quantization_config=MXFP4),
        write(source, target / "worth", worth),
    )


def stacked(source: Path, target: Path) -> Path:
    """The checkpoint with each layer's experts in one tensor, as transformers keeps them in memory."""
    from transformers import AutoModelForCausalLM

    return write(source, target, AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict())
