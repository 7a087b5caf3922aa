"""A checkpoint's config.json, checked: it comes from strangers and is edited by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .model_config import num_experts_of, num_experts_per_tok

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("moe_intermediate_size", "max_position_embeddings"),
)
_MOST_EXPERTS = 1 << 16
"""Far above any model's; what is per expert would fill the memory before weights are found to be missing."""
_MAX_REASON_CHARS = 400


def load_config(directory: Path) -> PreTrainedConfig:
    """Return the model's configuration; never runs code from the checkpoint.

    Raises ``ValueError`` naming ``model``, the file and, where transformers or a look tells, its field.
    """
    from transformers import AutoConfig

    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"model: {directory} has no config.json")
    _check_types(path, _read(path))
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # wrong types, unknown model type, custom code: transformers raises many types
        raise ValueError(f"model: config.json in {directory} cannot be used: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """Return what ``error`` says, without line breaks, and no more than fits a message."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return reason if len(reason) <= _MAX_REASON_CHARS else f"{reason[:_MAX_REASON_CHARS]} ..."


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"model: {path} is not JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"model: {path} holds {_kind(content)}, expected an object")
    return content


def _check_types(path: Path, content: dict[str, Any]) -> None:
    """Raise for what transformers trips over without naming it."""
    if not isinstance(content.get("model_type"), str):
        found = f"is {content['model_type']!r}" if "model_type" in content else "is missing"
        raise ValueError(f"model: {path}: model_type {found}, expected the architecture's name, such as 'qwen3_moe'")
    for name in _SIZES:
        size = content.get(name)
        if size is not None and not isinstance(size, list) and type(size) is not int:
            raise ValueError(f"model: {path}: {name} is {size!r}, expected an integer")
    for name in ("dtype", "torch_dtype"):
        dtype = content.get(name)
        if dtype is not None and not (isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)):
            raise ValueError(f"model: {path}: {name} is {dtype!r}, expected a type of torch's, such as 'bfloat16'")
    if not isinstance(content.get("quantization_config") or {}, dict):
        raise ValueError(
            f"model: {path}: quantization_config is {content['quantization_config']!r}, expected an object"
        )


def check_sizes(directory: Path, config: object) -> None:
    """Raise ``ValueError`` naming ``model`` and the field for sizes that no MoE model has: transformers takes any."""
    path = directory / "config.json"
    for name in _SIZES:
        value = vars(config).get(name)  # as an attribute, what varies by layer raises
        # a list has one for each layer
        if value is not None and not isinstance(value, list) and not (type(value) is int and value >= 1):
            raise ValueError(f"model: {path}: {name} is {value!r}, expected an integer of at least 1")
    num_experts, top_k = num_experts_of(config), num_experts_per_tok(config)
    if not 1 <= num_experts <= _MOST_EXPERTS:
        raise ValueError(f"model: {path}: the number of experts is {num_experts}, expected 1 to {_MOST_EXPERTS}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"model: {path}: the number of experts per token is {top_k}, expected 1 to {num_experts}")


def _kind(content: object) -> str:
    kinds = {list: "a list", str: "a string", type(None): "null", bool: "a truth value"}
    return kinds.get(type(content), "a number")
