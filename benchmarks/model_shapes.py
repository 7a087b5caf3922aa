"""Whole models by their published shapes: what a config.json says, and how many parameters that makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One model. ``settings``: its config.json on the hub, less what weights and steps do not depend on."""

    name: str
    source: str
    """The hub's repository whose config.json it is."""
    model_type: str
    num_parameters: int
    """Of the published weights."""
    settings: dict[str, Any]

    def config(self) -> PreTrainedConfig:
        """Return transformers' configuration; every call makes another."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, **self.settings)


_COMMON: dict[str, Any] = {"tie_word_embeddings": False}


def _yarn(theta: float, factor: float, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        **more,
    }


def _plain(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


SHAPES = (
    ModelShape(
        "Mixtral-8x7B",
        "mistralai/Mixtral-8x7B-v0.1",
        "mixtral",
        46_702_792_704,
        {
            **_COMMON,
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "rope_parameters": _plain(1e6),
        },
    ),
    ModelShape(
        "OLMoE-1B-7B",
        "allenai/OLMoE-1B-7B-0924",
        "olmoe",
        6_919_161_856,
        {
            **_COMMON,
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _plain(1e4),
        },
    ),
    ModelShape(
        "Qwen3-30B-A3B",
        "Qwen/Qwen3-30B-A3B",
        "qwen3_moe",
        30_532_122_624,
        {
            **_COMMON,
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
            "rope_parameters": _plain(1e6),
        },
    ),
    ModelShape(
        "DeepSeek-V2-Lite",
        "deepseek-ai/DeepSeek-V2-Lite",
        "deepseek_v2",
        15_706_484_224,
        {
            **_COMMON,
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": False,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "max_position_embeddings": 163840,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _yarn(1e4, 40.0, mscale=0.707, mscale_all_dim=0.707),
        },
    ),
    ModelShape(
        "GPT-OSS-20B",
        "openai/gpt-oss-20b",
        "gpt_oss",
        20_914_757_184,
        {
            **_COMMON,
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "rope_parameters": _yarn(1.5e5, 32.0, truncate=False),
        },
    ),
)
