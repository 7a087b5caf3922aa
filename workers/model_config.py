"""What a model's config.json says that architectures name in different ways."""

from __future__ import annotations

from pathlib import Path


def num_experts_of(config: object) -> int:
    """Return the routed experts of each layer; raise ``ValueError`` if layers differ or ``config`` does not say."""
    return _number(config, "experts", ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"))


def num_experts_per_tok(config: object) -> int:
    """Return the experts that a row uses; raise ``ValueError`` if layers differ or ``config`` does not say."""
    return _number(config, "experts per token", ("num_experts_per_tok", "moe_topk", "top_k_experts"))


def longest_context(config: object, max_model_len: int | None = None) -> int:
    """Return ``max_model_len``, the model's own limit when None; raise ``ValueError`` if it is above that."""
    limit = int(config.max_position_embeddings)  # type: ignore[attr-defined]
    if max_model_len is not None and max_model_len > limit:
        raise ValueError(f"max_model_len: {max_model_len} is not in [1, {limit}], the model's longest context")
    return max_model_len or limit


def _number(config: object, what: str, names: tuple[str, ...]) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list):  # one per layer
            if len(set(value)) != 1:
                raise ValueError(f"model: its layers differ in the number of {what}, which is not supported")
            value = value[0]
        if value:
            if type(value) is not int:
                raise ValueError(f"model: config.json says that {name} is {value!r}, expected an integer")
            return value
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
    ends = eos if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    if not all(isinstance(token_id, int) for token_id in ends):
        raise ValueError(f"model: {directory} says that {eos!r} ends an answer; expected token ids (eos_token_id)")
    return tuple(ends)
