"""From what a request brings, text, token ids or a conversation, to prompts that fit the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import anyio.to_thread

from ...workers.sampling_params import SamplingParams
from ..speculation.options import SpeculationOptions
from .api_error import ApiError
from .prediction import encode_prediction
from .protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from .serving_state import ServingState

_INLINE_CHARS = 4096
"""Prompts up to this long are tokenized on the event loop: a thread costs more."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """One prompt, and how its outputs are sampled."""

    param: str
    """The field it came in, for error messages."""
    token_ids: list[int]
    sampling: SamplingParams
    text: str = ""
    """Only for requests that want it back."""


async def encode_completion(
    state: ServingState, body: CompletionRequest, sampling: SamplingParams
) -> list[EncodedPrompt]:
    """Return the prompts of a completion request, checked; raise 400 naming the one at fault."""
    given = body.prompts
    num_chars = sum(len(prompt) for prompt in given if isinstance(prompt, str))

    def encode() -> list[list[int]]:
        return [_encode(state, prompt, name, body) for prompt, name in zip(given, names, strict=True)]

    names = ["prompt"] if len(given) == 1 else [f"prompt[{i}]" for i in range(len(given))]
    encoded = await run_tokenizer(encode, num_chars)
    prompts = []
    for prompt, name, token_ids in zip(given, names, encoded, strict=True):
        fitting = _fit(state, name, _truncate(state, body, token_ids), body, sampling)
        if body.echo:
            if isinstance(prompt, str) and len(fitting.token_ids) == len(token_ids):
                text = prompt
            else:
                text = state.tokenizer.decode(fitting.token_ids, skip_special_tokens=False)
            fitting = replace(fitting, text=text)
        prompts.append(fitting)
    return prompts


async def encode_chat(state: ServingState, body: ChatCompletionRequest, sampling: SamplingParams) -> EncodedPrompt:
    """Return the prompt of a conversation, checked; raise 400 naming the part at fault."""

    def encode() -> list[int]:
        return state.tokenizer.encode_chat(
            body.messages,
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            add_special_tokens=bool(body.add_special_tokens),
            max_tokens=_max_tokens(state, body),
        )

    token_ids = await run_tokenizer(encode, num_chars(body.messages))
    return _fit(state, "messages", _truncate(state, body, token_ids), body, sampling)


async def encode_speculation(state: ServingState, body: GenerationRequest) -> SpeculationOptions:
    """Return what the request says of drafting, its prediction tokenized and checked; raise 400 naming the field."""

    def encode() -> SpeculationOptions:
        prediction = encode_prediction(state.tokenizer, body.prediction_text(), state.max_model_len)
        options = replace(body.speculation_options(), prediction_token_ids=prediction)
        options.check_prediction(state.vocab_size, state.max_model_len)
        return options

    return await run_tokenizer(encode, num_chars(body.prediction))


async def run_tokenizer(encode: Callable[[], Any], size: int) -> Any:
    """Return what ``encode`` returns; off the event loop if there are many characters. ``ValueError`` becomes 400."""
    try:
        return encode() if size <= _INLINE_CHARS else await anyio.to_thread.run_sync(encode)
    except ValueError as error:
        raise ApiError.from_value_error(error) from error


def num_chars(content: Any) -> int:
    """Return how many characters there are in all strings of some JSON."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        return sum(map(num_chars, content))
    return len(content) if isinstance(content, str) else 0


def check_vocabulary(state: ServingState, param: str, token_ids: Sequence[int]) -> None:
    """Raise 400 for a token id that is not the model's."""
    for token_id in token_ids:
        if not 0 <= token_id < state.vocab_size:
            message = f"{param}: token id {token_id} is not in [0, {state.vocab_size - 1}]"
            raise ApiError(400, message, param=param, code="invalid_value")


def _encode(state: ServingState, prompt: str | list[int], name: str, body: CompletionRequest) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    try:
        return state.tokenizer.encode(
            prompt, add_special_tokens=body.add_special_tokens is not False, max_tokens=_max_tokens(state, body)
        )
    except ValueError as error:
        raise type(error)(str(error).replace("prompt", name, 1)) from error


def _max_tokens(state: ServingState, body: GenerationRequest) -> int | None:
    """Return how long a text may be before `_truncate`."""
    return state.max_model_len if body.truncate_prompt_tokens is None else None


def _truncate(state: ServingState, body: GenerationRequest, token_ids: list[int]) -> list[int]:
    """Return the last tokens of a prompt, as many as ``truncate_prompt_tokens`` allows."""
    limit = body.truncate_prompt_tokens
    if limit is None:
        return token_ids
    if limit == -1:
        output = body.limit if body.limit is not None else body.default_max_tokens or 1
        limit = max(1, state.max_model_len - output)
    if not 1 <= limit <= state.max_model_len:
        message = f"truncate_prompt_tokens: {limit} is not -1 or in [1, {state.max_model_len}]"
        raise ApiError(400, message, param="truncate_prompt_tokens", code="invalid_value")
    return token_ids[-limit:]


def _fit(
    state: ServingState, param: str, token_ids: list[int], body: GenerationRequest, sampling: SamplingParams
) -> EncodedPrompt:
    """Return the prompt with its ``max_tokens`` and seed decided; 400 if prompt and output do not fit together."""
    if not token_ids:
        raise ApiError(400, f"{param}: expected at least one token", param=param, code="invalid_value")
    room = state.max_model_len - len(token_ids)
    if room < (sampling.max_tokens != 0):
        message = f"{param}: {len(token_ids)} tokens leave no room for output; max_model_len is {state.max_model_len}"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    check_vocabulary(state, param, token_ids)
    if sampling.max_tokens is not None and sampling.max_tokens > room:
        limit = body.max_tokens_field
        message = (
            f"{limit}: {sampling.max_tokens} is not in [1, {room}]: "
            f"{param} has {len(token_ids)} tokens and max_model_len is {state.max_model_len}"
        )
        raise ApiError(400, message, param=limit, code="context_length_exceeded")
    try:
        if sampling.max_tokens is None:
            default = body.default_max_tokens
            sampling = replace(sampling, max_tokens=room if default is None else min(default, room))
    except ValueError as error:  # min_tokens may exceed the default
        raise ApiError.from_value_error(error) from error
    # one for all choices of a prompt, which differ by their numbers; prompts that are alike differ by their seeds
    return EncodedPrompt(param, token_ids, sampling.with_seed())
