"""A compact Qwen3-MoE for training on a CPU; parameter names and function equal transformers' model.

Shapes: B rows, S tokens a row, T = B*S, H hidden, F expert intermediate, E experts, K experts per token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3MoeConfig

ROPE_THETA = 10000.0
# `head_dim` is an attribute that transformers 5 takes but does not declare.
SIZES: dict[str, Any] = {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA}}
CONFIG = Qwen3MoeConfig(
    vocab_size=1024,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=64,
    intermediate_size=64,
    norm_topk_prob=True,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    **SIZES,
)


class GroupedLinear(torch.autograd.Function):
    """y[i] = x[i] @ weight[e].T for the rows i of each expert e, rows sorted by expert; no padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        """`x` [rows, in], `weight` [E, out, in], `counts` rows of each expert; returns [rows, out]."""
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        y = x.new_empty(x.shape[0], weight.shape[1])
        for xs, w, ys in zip(x.split(counts), weight, y.split(counts), strict=True):
            torch.mm(xs, w.t(), out=ys)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of `x` and `weight`."""
        x, weight = ctx.saved_tensors
        dy = grads[0].contiguous()
        dx, dw = torch.empty_like(x), torch.empty_like(weight)
        parts = zip(x.split(ctx.counts), dy.split(ctx.counts), dx.split(ctx.counts), weight, dw, strict=True)
        for xs, dys, dxs, w, dws in parts:
            torch.mm(dys, w, out=dxs)
            torch.mm(dys.t(), xs, out=dws)
        return dx, dw, None


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys and rotary positions."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        inner = config.num_attention_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, inner, bias=False)
        self.k_proj = nn.Linear(hidden, inner, bias=False)
        self.v_proj = nn.Linear(hidden, inner, bias=False)
        self.o_proj = nn.Linear(inner, hidden, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` [B, S, H], additive `mask` [B, 1, S, S], `cos`, `sin` [B, 1, S, head_dim]."""
        b, s, _ = x.shape
        q, k, v = F.linear(x, torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])).chunk(3, dim=-1)
        q = self.q_norm(q.view(b, s, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(k.view(b, s, -1, self.head_dim)).transpose(1, 2)
        v = v.view(b, s, -1, self.head_dim).transpose(1, 2)
        q, k = q * cos + _rotate(q) * sin, k * cos + _rotate(k) * sin
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(b, s, -1))


def _rotate(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class Experts(nn.Module):
    """All experts' weights, stacked as transformers stacks them."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__()
        e, f, h = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * f, h))
        self.down_proj = nn.Parameter(torch.empty(e, h, f))


class SparseMoe(nn.Module):
    """Softmax router, K experts per token with renormalised weights, and the layer's Switch auxiliary loss."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [T, H] to output [T, H] and the auxiliary loss (1 when balanced; Fedus et al. 2021, eq. 4)."""
        probs = self.gate(x).softmax(-1)
        weight, expert = probs.topk(self.top_k, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        order = expert.flatten().argsort()
        counts = torch.bincount(expert.flatten(), minlength=self.num_experts)
        token = order // self.top_k
        sizes = counts.tolist()
        gate, up = GroupedLinear.apply(x[token], self.experts.gate_up_proj, sizes).chunk(2, dim=-1)
        y = GroupedLinear.apply(F.silu(gate) * up, self.experts.down_proj, sizes)
        y = torch.zeros_like(x).index_add(0, token, y * weight.flatten()[order, None])
        share = counts.to(x.dtype) / counts.sum()
        return y, self.num_experts * (share * probs.mean(0)).sum()


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseMoe(config)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [B, S, H] to output [B, S, H] and auxiliary loss."""
        x = x + self.self_attn(self.input_layernorm(x), mask, cos, sin)
        y, aux = self.mlp(self.post_attention_layernorm(x).flatten(0, 1))
        return x + y.view_as(x), aux


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Net(nn.Module):
    """The training model; `state_dict` loads into transformers' `Qwen3MoeForCausalLM` as it is."""

    def __init__(self, config: Qwen3MoeConfig = CONFIG) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        exponent = torch.arange(0, config.head_dim, 2) / config.head_dim
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", ROPE_THETA**-exponent, persistent=False)
        residual = 1 / math.sqrt(2 * config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                continue
            std = 1 / math.sqrt(parameter.shape[-1])
            if name.endswith("embed_tokens.weight"):
                std = 0.5
            elif name.startswith("lm_head"):
                std = 0.02
            elif "o_proj" in name or "down_proj" in name:
                std *= residual
            nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor, document: Tensor, where: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits and the layers' mean auxiliary loss.

        `tokens`, `document` [B, S]: documents are numbered 1, 2, ... within a row, 0 is padding; attention stays
        within a document and positions restart with each. `where` [B, S] bool selects the positions whose logits
        are wanted: [selected, vocab]; without it [B*S, vocab].
        """
        b, s = tokens.shape
        index = torch.arange(s)
        starts = torch.ones_like(document, dtype=torch.bool)
        starts[:, 1:] = document[:, 1:] != document[:, :-1]
        position = index - torch.where(starts, index, 0).cummax(dim=1).values
        angle = position[..., None] * self.inv_freq
        angle = torch.cat([angle, angle], dim=-1)[:, None]
        cos, sin = angle.cos(), angle.sin()
        visible = (document[:, :, None] == document[:, None, :]) & (index[:, None] >= index)
        mask = torch.zeros(b, 1, s, s).masked_fill_(~visible[:, None], float("-inf"))
        x = self.model.embed_tokens(tokens)
        aux = x.new_zeros(())
        for layer in self.model.layers:
            x, layer_aux = layer(x, mask, cos, sin)
            aux = aux + layer_aux / len(self.model.layers)
        x = x.flatten(0, 1)
        if where is not None:
            x = x[where.flatten()]
        return self.lm_head(self.model.norm(x)), aux
