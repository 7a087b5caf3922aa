"""Checkpoints that the tests make, and transformers' own output for them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import httpx

    from penstock.cluster.api.chat_tokenizer import ChatTokenizer

    from .scripted_backend import ScriptedBackend

# Before torch is imported: more threads than cores make tiny tensors slow
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

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


def _settings(model_type: str) -> dict[str, Any]:
    if model_type == "gemma4":  # images are not served, but their tower is part of the checkpoint
        vision = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
        return {
            "text_config": _settings("gemma4_text"),
            "vision_config": {"hidden_size": 32, "intermediate_size": 32, **vision},
            "audio_config": None,
            **dict.fromkeys(("image_token_id", "video_token_id", "audio_token_id"), 1),
            **dict.fromkeys(("boi_token_id", "eoi_token_id"), 0),
            "eos_token_id": EOS,
        }
    return {**_COMMON, **(CONFIGS.get(model_type) or REFUSED_CONFIGS[model_type])}


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], Any]:
    """Return transformers' model of a type, tiny, with random f32 weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(model_type: str) -> Any:
        torch.manual_seed(7)
        config = AutoConfig.for_model(model_type, **_settings(model_type))
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    return make


@pytest.fixture(scope="session")
def checkpoint(tiny_model: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the directory of a tiny random f32 checkpoint of a model type, made on first use."""
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            import torch

            from penstock.workers.architectures import objection

            if reason := objection(model_type):
                pytest.skip(f"{model_type}: {reason}")
            model = tiny_model(model_type)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):  # zero when fresh
                    buffer.uniform_(-0.2, 0.2)
            for name, parameter in model.named_parameters():
                # Zero or tiny when fresh, and then nothing would be tested
                if name.endswith((".sinks", "_bias")) and "vision" not in name:
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


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """Return a small tokenizer with a chat template; some of its tokens are parts of characters."""
    from .scripted_backend import save_tokenizer

    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def backend(tokenizer: ChatTokenizer) -> ScriptedBackend:
    """Return an engine without a model: its pace, text and failures are the test's."""
    from .scripted_backend import ScriptedBackend

    return ScriptedBackend(tokenizer.vocab_size)


@pytest.fixture
async def http(backend: ScriptedBackend, tokenizer: ChatTokenizer) -> AsyncIterator[httpx.AsyncClient]:
    """Return a client of the application over ``backend``, in this process."""
    from penstock.cluster.api.openai_api import create_app
    from penstock.cluster.api.serving_state import ServingState

    from .openai_app import NAMES, client_of

    async with client_of(create_app(await ServingState.create(backend, tokenizer, NAMES, "/the/root"))) as client:
        yield client
