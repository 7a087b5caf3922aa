"""Which model types are served, and why others are refused."""

from __future__ import annotations

import inspect
import logging
import re
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

SUPPORTED = (
    "afmoe",
    "aria_text",
    "axk1",
    "beam",
    "cohere2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "gemma4",
    "gemma4_text",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "kolibri1",
    "laguna",
    "mellum",
    "mimo_v2_flash",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "solar_open",
)
"""Model types whose output is tested to be token-identical to transformers' own. A version may lack some of them."""

UNSTEERABLE = {"phimoe": "its router (sparsemixer) does not select by top-k"}
"""Served model types whose choice of experts cannot be steered, and why."""

ROUTER_CLASS = re.compile(r"(Router|Gate)$")
"""What transformers calls the class of every router; gates of shared experts are plain linears."""

_NOT_CAUSAL = "transformers has no causal language model of that type"
_DENSE = "it has no Mixture-of-Experts layer"
# What gives an architecture away in transformers' source of it; a test names a type for each
_OBJECTIONS = (
    (
        re.compile(r"\b(update_conv_state|update_recurrent_state|set_linear_cache)\("),
        "it keeps a recurrent state, which cannot be rolled back when a draft is rejected",
    ),
    (
        re.compile(r"^class \w*Indexer\(", re.MULTILINE),
        "its attention reads only the keys that an indexer picks, whose own cache cannot be paged",
    ),
)
_EXPERTS_INTERFACE = re.compile(r"^@use_experts_implementation", re.MULTILINE)
_ANY_EXPERTS = re.compile(r"^class \w*(Experts|MoE|Moe|MoeBlock)\(", re.MULTILINE)
_OWN_EXPERTS = "its experts do not go through transformers' experts interface"


def check_supported(model_type: str) -> None:
    """Raise ``ValueError`` naming the field ``model`` unless ``model_type`` can be served.

    A type outside ``SUPPORTED`` with nothing against it is let through with a warning: its tokens were never compared
    with transformers' own, and only what loading and the probing forward check is known of it.
    """
    reason = objection(model_type)
    if reason:
        raise ValueError(
            f"model: architecture {model_type!r} is not supported: {reason}; supported: {', '.join(SUPPORTED)}"
        )
    if model_type not in SUPPORTED:
        logger.warning("model: the output of architecture %r was never compared with transformers' own", model_type)


@cache
def objection(model_type: str) -> str | None:
    """Return why ``model_type`` cannot be served with the installed transformers; None when nothing is known."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return _NOT_CAUSAL
    source = modeling_source(model_type)
    if not has_experts(source):
        return _DENSE
    if not _EXPERTS_INTERFACE.search(source):
        return _OWN_EXPERTS
    return next((reason for pattern, reason in _OBJECTIONS if pattern.search(source)), None)


def has_experts(source: str) -> bool:
    """Return whether a modelling ``source`` has Mixture-of-Experts layers."""
    return bool(_EXPERTS_INTERFACE.search(source) or (_ANY_EXPERTS.search(source) and "topk(" in source))


@cache
def modeling_source(model_type: str) -> str:
    """Return transformers' modelling source of ``model_type``; empty when it has none."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return ""
    config = Path(inspect.getfile(CONFIG_MAPPING[model_type]))
    path = config.with_name(config.name.replace("configuration_", "modeling_"))
    return path.read_text(encoding="utf-8") if path.is_file() else ""
