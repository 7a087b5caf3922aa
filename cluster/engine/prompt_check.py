"""Whether a prompt can be served, checked before it is queued."""

from __future__ import annotations

from collections.abc import Sequence

from ...workers.model_info import ModelInfo
from ...workers.sampling_params import SamplingParams


def check_prompt(model: ModelInfo, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> int:
    """Return the longest prompt plus output the request may reach; raise ``ValueError`` naming the field."""
    num_prompt = len(prompt_token_ids)
    if sampling.n != 1:
        raise ValueError(f"n: {sampling.n} is not 1: each output is a request of its own")
    if not num_prompt:
        raise ValueError("prompt: it has no tokens")
    if not all(isinstance(t, int) and not isinstance(t, bool) and 0 <= t < model.vocab_size for t in prompt_token_ids):
        raise ValueError(f"prompt: token ids must be integers in [0, {model.vocab_size - 1}]")
    if num_prompt >= model.max_model_len + (sampling.max_tokens == 0):
        raise ValueError(
            f"prompt: {num_prompt} tokens leave no room for output; max_model_len is {model.max_model_len}"
        )
    sampling.check_vocabulary(model.vocab_size, model.eos_token_ids)
    if sampling.max_tokens is None:
        return model.max_model_len
    if num_prompt + sampling.max_tokens > model.max_model_len:
        raise ValueError(
            f"max_tokens: {sampling.max_tokens} is not in [1, {model.max_model_len - num_prompt}]: the prompt has "
            f"{num_prompt} tokens and max_model_len is {model.max_model_len}"
        )
    return num_prompt + sampling.max_tokens
