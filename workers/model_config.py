"""What a model's config.json says that architectures name in different ways."""

from __future__ import annotations

from pathlib import Path


def num_experts_of(config: object) -> int:
    """Return the routed experts of each layer; raise ``ValueError`` if layers differ or ``config`` does not say."""
    return _number(config, "experts", ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"))


def num_experts_per_tok(config: object) -> int:
    """Return the experts that a row uses; raise ``ValueError`` if layers differ or ``config`` does not say."""
    return _number(config, "experts per token", ("num_experts_per_tok", "moe_topk", "top_k_experts"))


def _number(config: object, what: str, names: tuple[str, ...]) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list):  # one per layer
            if len(set(value)) != 1:
                raise ValueError(f"model: its layers differ in the number of {what}, which is not supported")
            value = value[0]
        if value:
            return int(value)
    raise ValueError(f"model: config.json names no number of {what}")


def eos_token_ids(directory: Path, config: object) -> tuple[int, ...]:
    """Return the tokens that end an answer; raise ``ValueError`` if the generation config cannot be read."""
    from transformers import GenerationConfig

    eos = None
    if (directory / "generation_config.json").is_file():
        try:
            eos = GenerationConfig.from_pretrained(directory).eos_token_id
        except (OSError, ValueError) as error:
            raise ValueError(f"model: generation_config.json in {directory} cannot be used: {error}") from error
    if eos is None:
        eos = getattr(config, "eos_token_id", None)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
