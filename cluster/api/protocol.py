"""The request bodies of the OpenAI API: what is taken, what is refused, what does no harm."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from ...workers.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 16
"""Of /v1/completions; a chat runs to the end of its turn or of the context."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "use_beam_search": (False,),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "prompt_embeds": (),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "return_token_ids": (False,),
}
"""Fields that would change the output and are not supported, with the values that ask for nothing (as null does)."""

_HARMLESS = {
    "metadata",
    "moderation",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}


def _stop(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ValueError("expected a string or a list of up to 16 strings")


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


def _prompt(value: Any) -> Any:
    if isinstance(value, str) or _is_token_ids(value):
        return value
    if isinstance(value, list) and value and all(isinstance(item, str) or _is_token_ids(item) for item in value):
        if len(value) > 1:
            raise ValueError(f"{len(value)} prompts in one request are not supported; send one request for each")
        return value[0]
    raise ValueError("expected a string or a list of token ids")


class StreamOptions(BaseModel):
    """What a stream carries besides the text."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


# a reference would point nowhere once the schema is part of the API's
_INLINE_STREAM_OPTIONS = WithJsonSchema({"type": "object", "properties": {"include_usage": {"type": "boolean"}}})


class GenerationRequest(BaseModel):
    """What both endpoints take. Unsupported fields that change the meaning are refused; unknown ones are ignored."""

    model_config = ConfigDict(strict=True, extra="allow", hide_input_in_errors=True)

    model: str
    stream: bool | None = None
    stream_options: Annotated[StreamOptions | None, _INLINE_STREAM_OPTIONS] = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Annotated[str | list[str] | None, BeforeValidator(_stop)] = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def max_tokens_field(self) -> str:
        """The name under which the request limits its output."""
        return "max_tokens"

    @property
    def num_unknown_fields(self) -> int:
        """Fields neither known to the API nor to us, which are ignored."""
        return sum(name not in _NEUTRAL and name not in _HARMLESS for name in self.model_extra or {})

    def check_supported(self) -> None:
        """Raise ``ValueError`` naming the field if the request asks for something that is not supported."""
        for name, value in (self.model_extra or {}).items():
            if name not in _NEUTRAL and not name.startswith("guided_"):
                continue
            neutral = _NEUTRAL.get(name, ())
            # True == 1 in Python, not in JSON
            if value is None or any(
                value == item and isinstance(value, bool) is isinstance(item, bool) for item in neutral
            ):
                continue
            valid = " or ".join(f"{item!r}" for item in (*neutral, None)).replace("None", "null")
            raise ValueError(f"{name}: {value!r} is not supported; valid: {valid}")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")

    def sampling_params(self) -> SamplingParams:
        """Return what the request asks of sampling; raises ``ValueError`` naming the field and its valid range."""
        given = {
            "max_tokens": self.limit,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "seed": self.seed,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
        }
        return SamplingParams.from_kwargs(**{name: value for name, value in given.items() if value is not None})

    @property
    def limit(self) -> int | None:
        """Most output tokens, if the request says so."""
        return self.max_tokens


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[str | list[int], BeforeValidator(_prompt)]


class ChatCompletionRequest(GenerationRequest):
    """The body of POST /v1/chat/completions. `ChatTokenizer` checks the messages."""

    messages: list[Any] = Field(
        description="Each with role (system, user, assistant) and content (string or text parts)."
    )
    max_completion_tokens: int | None = None

    def check_supported(self) -> None:
        """Raise ``ValueError`` naming the field if the request asks for something that is not supported."""
        super().check_supported()
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_completion_tokens: differs from max_tokens; send one of them")

    @property
    def max_tokens_field(self) -> str:
        """The name under which the request limits its output."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def limit(self) -> int | None:
        """Most output tokens, if the request says so."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
