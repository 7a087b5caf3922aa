"""Checkpoints that the tests make, and transformers' own output for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Before torch is imported: more threads than cores make tiny tensors slow
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

VOCAB = 96
EOS = 2


def _configs() -> dict[str, object]:
    from transformers import (
        DeepseekV2Config,
        DeepseekV3Config,
        Ernie4_5_MoeConfig,
        Glm4MoeConfig,
        GptOssConfig,
        GraniteMoeConfig,
        MiniMaxM2Config,
        MixtralConfig,
        OlmoeConfig,
        Qwen2MoeConfig,
        Qwen3MoeConfig,
    )

    common = {
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
    mla = {
        **common,
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
    return {
        "qwen3_moe": Qwen3MoeConfig(
            **common, intermediate_size=48, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2, head_dim=8
        ),
        "qwen2_moe": Qwen2MoeConfig(
            **common,
            intermediate_size=48,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            num_experts=8,
            num_experts_per_tok=2,
        ),
        "olmoe": OlmoeConfig(**common, intermediate_size=24, num_experts=8, num_experts_per_tok=3),
        "mixtral": MixtralConfig(
            **common, intermediate_size=24, num_local_experts=8, num_experts_per_tok=2, sliding_window=12
        ),
        "deepseek_v2": DeepseekV2Config(
            **mla, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=1.0
        ),
        "deepseek_v3": DeepseekV3Config(**mla, n_group=4, topk_group=2),
        "ernie4_5_moe": Ernie4_5_MoeConfig(
            **common,
            intermediate_size=48,
            moe_intermediate_size=24,
            moe_num_experts=8,
            moe_k=2,
            moe_num_shared_experts=1,
            moe_layer_start_index=0,
        ),
        "glm4_moe": Glm4MoeConfig(
            **common,
            head_dim=8,
            intermediate_size=48,
            moe_intermediate_size=24,
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
        ),
        "gpt_oss": GptOssConfig(
            **common,
            head_dim=8,
            intermediate_size=24,
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "granitemoe": GraniteMoeConfig(
            **common, intermediate_size=24, num_local_experts=8, num_experts_per_tok=2, logits_scaling=2.0
        ),
        "minimax_m2": MiniMaxM2Config(
            **common, head_dim=8, intermediate_size=24, num_local_experts=8, num_experts_per_tok=2
        ),
    }


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the directory of a tiny random f32 checkpoint of a model type, made on first use."""
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            import torch
            from transformers import AutoModelForCausalLM

            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(_configs()[model_type], dtype=torch.float32)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.uniform_(-0.2, 0.2)
            for name, parameter in model.named_parameters():
                if name.endswith((".sinks", "_bias")):  # zero or tiny when fresh, and then nothing would be tested
                    torch.nn.init.normal_(parameter, std=0.5)
            made[model_type] = tmp_path_factory.mktemp(model_type)
            model.save_pretrained(made[model_type], max_shard_size="60KB")
        return made[model_type]

    return make


@pytest.fixture(scope="session")
def reference() -> Callable[..., list[int]]:
    """Return transformers' greedy continuation of a prompt."""
    models: dict[Path, object] = {}

    def generate(directory: Path, prompt: list[int], max_new_tokens: int, *, ignore_eos: bool = False) -> list[int]:
        import torch
        from transformers import AutoModelForCausalLM

        if directory not in models:
            models[directory] = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        model = models[directory]
        ids = torch.tensor([prompt])
        stop = {"eos_token_id": 10**6} if ignore_eos else {}
        with torch.inference_mode():
            out = model.generate(  # type: ignore[attr-defined]
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens, **stop
            )
        return out[0, len(prompt) :].tolist()

    return generate
