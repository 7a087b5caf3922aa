"""Configurations of tiny models of every type, served and refused."""

from __future__ import annotations

from typing import Any

VOCAB = 96
EOS = 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": EOS,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
}
_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2}
_LOCAL: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
_ROUTED: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 2}
_WIDTHS: dict[str, Any] = {"intermediate_size": 48, "moe_intermediate_size": 24}
_GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}
_WINDOWS: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_DENSE_FIRST: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse"]}

# Eight experts each, and whatever else the type has switched on: windows shorter than the prompts, groups, dense layers
CONFIGS: dict[str, dict[str, Any]] = {
    "afmoe": {**_EXPERTS, **_WIDTHS, **_WINDOWS, "head_dim": 8, "num_dense_layers": 1, "num_shared_experts": 1},
    "aria_text": {"intermediate_size": 24, "moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": {**_MLA, **_GROUPS, **_DENSE_FIRST},
    "beam": {
        **_EXPERTS,
        **_WIDTHS,
        **_WINDOWS,
        **_GROUPS,
        **_DENSE_FIRST,
        "head_dim": 8,
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": None},
    },
    "cohere2_moe": {
        **_EXPERTS,
        **_WINDOWS,
        **_DENSE_FIRST,
        "head_dim": 8,
        "intermediate_size": 24,
        "num_shared_experts": 1,
        "expert_selection_fn": "sigmoid",
    },
    "deepseek_v2": {**_MLA, **_GROUPS, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.0},
    "deepseek_v3": {**_MLA, **_GROUPS},
    "dots1": {
        **_ROUTED,
        **_WIDTHS,
        **_WINDOWS,
        **_GROUPS,
        "head_dim": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "ernie4_5_moe": {
        **_WIDTHS,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
    },
    "exaone_moe": {
        **_EXPERTS,
        **_WIDTHS,
        **_WINDOWS,
        **_GROUPS,
        **_DENSE_FIRST,
        "head_dim": 8,
        "num_shared_experts": 1,
    },
    "flex_olmo": {**_EXPERTS, "intermediate_size": 24},
    "flint": {
        **_EXPERTS,
        **_WIDTHS,
        **_WINDOWS,
        "head_dim": 8,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [0],
    },
    "gemma4_text": {
        **_WIDTHS,
        **_WINDOWS,
        "head_dim": 8,
        "per_layer_config": {1: {"head_dim": 16}},
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
    },
    "glm4_moe": {
        **_ROUTED,
        **_WIDTHS,
        **_GROUPS,
        "head_dim": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "glm4_moe_lite": {**_MLA, **_GROUPS, **_DENSE_FIRST},
    "gpt_oss": {**_LOCAL, **_WINDOWS, "head_dim": 8, "intermediate_size": 32},
    "granitemoe": {**_LOCAL, "intermediate_size": 24, "logits_scaling": 2.0},
    "granitemoe_swa": {**_LOCAL, **_WINDOWS, "intermediate_size": 24, "shared_intermediate_size": 40},
    "granitemoeshared": {**_LOCAL, "intermediate_size": 24, "shared_intermediate_size": 40},
    "hunyuan_v1_moe": {"intermediate_size": 24, "head_dim": 8, "num_experts": 8, "moe_topk": [2, 2]},
    "hy_v3": {**_EXPERTS, **_WIDTHS, **_DENSE_FIRST, "head_dim": 8, "num_shared_experts": 1},
    "kolibri1": {
        **_LOCAL,
        **_WINDOWS,
        "head_dim": 8,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "laguna": {
        **_EXPERTS,
        **_WIDTHS,
        **_WINDOWS,
        **_DENSE_FIRST,
        "head_dim": 8,
        "shared_expert_intermediate_size": 40,
        "num_attention_heads_per_layer": [4, 2],
    },
    "mellum": {**_LOCAL, **_WIDTHS, **_WINDOWS, **_DENSE_FIRST, "head_dim": 8},
    "mimo_v2_flash": {
        **_ROUTED,
        **_WIDTHS,
        **_WINDOWS,
        **_GROUPS,
        **_DENSE_FIRST,
        "head_dim": 12,
        "v_head_dim": 8,
    },
    "minimax_m2": {**_LOCAL, "head_dim": 8, "intermediate_size": 24},
    "mixtral": {**_LOCAL, "intermediate_size": 24, "sliding_window": 12},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24},
    "phimoe": {**_LOCAL, "intermediate_size": 24, "sliding_window": 12, "attention_bias": True, "lm_head_bias": True},
    "qwen2_moe": {
        **_EXPERTS,
        **_WIDTHS,
        **_WINDOWS,
        "use_sliding_window": True,
        "mlp_only_layers": [0],
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {**_EXPERTS, **_WIDTHS, "head_dim": 8, "use_sliding_window": True, "sliding_window": 12},
    "solar_open": {**_ROUTED, **_GROUPS, "head_dim": 8, "moe_intermediate_size": 24, "n_shared_experts": 1},
}


# Types that are refused, for the test that shows why
_SPARSE_ATTENTION: dict[str, Any] = {**_MLA, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 16}
REFUSED_CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v32": _SPARSE_ATTENTION,
    "glm_moe_dsa": _SPARSE_ATTENTION,
    "jamba": {
        **_EXPERTS,
        "intermediate_size": 24,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "jetmoe": {**_LOCAL, "intermediate_size": 24, "kv_channels": 8},
    "lfm2_moe": {**_EXPERTS, **_WIDTHS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "llama4_text": {
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "intermediate_size": 24,
        "intermediate_size_mlp": 48,
        "head_dim": 8,
    },
    "minimax": {
        **_LOCAL,
        "intermediate_size": 24,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "qwen3_next": {
        **_EXPERTS,
        **_WIDTHS,
        "head_dim": 8,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


def settings_of(model_type: str) -> dict[str, Any]:
    """Return all of a type's configuration."""
    if model_type == "gemma4":  # images are not served, but their tower is part of the checkpoint
        vision = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
        return {
            "text_config": settings_of("gemma4_text"),
            "vision_config": {"hidden_size": 32, "intermediate_size": 32, **vision},
            "audio_config": None,
            **dict.fromkeys(("image_token_id", "video_token_id", "audio_token_id"), 1),
            **dict.fromkeys(("boi_token_id", "eoi_token_id"), 0),
            "eos_token_id": EOS,
        }
    return {**_COMMON, **(CONFIGS.get(model_type) or REFUSED_CONFIGS[model_type])}
