"""Which model types may be served, and why others are refused."""

from __future__ import annotations

SUPPORTED = (
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
)
"""Model types whose output is tested to be token-identical to transformers' own."""

_REFUSED = {
    **dict.fromkeys(
        ("qwen3_next", "jamba", "kimi_linear", "bamba", "granitemoehybrid", "nemotron_h", "lfm2_moe", "qwen3_5_moe"),
        "it keeps a recurrent state, which cannot be rolled back when a draft is rejected",
    ),
    **dict.fromkeys(
        ("llama4", "dbrx", "longcat_flash", "step3p7", "nllb_moe", "switch_transformers", "jetmoe"),
        "its experts do not go through transformers' experts interface",
    ),
    "minimax": "it keeps a cache of its own, which cannot be paged or rolled back",
    "phimoe": "its router does not select by top-k, so its selection cannot be steered",
    "deepseek_v4": "its hash routers cannot be steered",
}


def check_supported(model_type: str) -> None:
    """Raise ``ValueError`` naming the field ``model`` unless ``model_type`` can be served."""
    if model_type in SUPPORTED:
        return
    reason = _REFUSED.get(model_type, "its output has not been tested against transformers' own")
    raise ValueError(
        f"model: architecture {model_type!r} is not supported: {reason}; supported: {', '.join(SUPPORTED)}"
    )
