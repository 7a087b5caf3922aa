"""The request bodies of the OpenAI API: what is taken, what is refused, what does no harm."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from ...workers.sampling_params import MAX_CHOICES, MAX_LISTED_TOKENS, MAX_LOGPROBS, MAX_STOP_CHARS, SamplingParams
from ..speculation.options import BUDGETS, MAX_DRAFT_LEN, MODES, SpeculationOptions
from .prediction import prediction_text

DEFAULT_MAX_TOKENS = 16
"""Of /v1/completions; a chat runs to the end of its turn or of the context."""
MAX_OUTPUTS = 1024
"""Most outputs of one request: prompts times n."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "top_logprobs": (0,),
    "length_penalty": (1,),
    "bad_words": ([],),
    "logits_processors": ([],),
    "use_beam_search": (False,),
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
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "return_tokens_as_token_ids": (False,),
}
"""Fields that would change the output and are not supported, with the values that ask for nothing (as null does).

A field that one endpoint supports is refused by the other.
"""

_HARMLESS = {
    "metadata",
    "moderation",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "spaces_between_special_tokens",
    "store",
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
    if isinstance(value, list) and (all(isinstance(item, str) for item in value) or all(map(_is_token_ids, value))):
        if len(value) > MAX_OUTPUTS:
            raise ValueError(f"expected at most {MAX_OUTPUTS} prompts, got {len(value)}")
        return value
    raise ValueError("expected a string, a list of token ids, a list of strings or a list of lists of token ids")


def _schema(kind: str, **bounds: Any) -> WithJsonSchema:
    """Describe a field whose range `SamplingParams` checks: its words name both ends."""
    return WithJsonSchema({"anyOf": [{"type": kind, **bounds}, {"type": "null"}]})


_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_PROMPT_SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            {"type": "string"},
            {**_TOKEN_IDS, "minItems": 1},
            {**_TEXTS, "maxItems": MAX_OUTPUTS},
            {"type": "array", "items": {**_TOKEN_IDS, "minItems": 1}, "minItems": 1, "maxItems": MAX_OUTPUTS},
        ]
    }
)
_STOP_STRING = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_STOP_SCHEMA = WithJsonSchema(
    {"anyOf": [_STOP_STRING, {"type": "array", "items": _STOP_STRING, "maxItems": 16}, {"type": "null"}]}
)
_BIAS_SCHEMA = _schema(
    "object",
    propertyNames={"pattern": "^[0-9]{1,10}$"},
    additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
    maxProperties=MAX_LISTED_TOKENS,
)
_TokenIds = Annotated[list[int] | None, _schema("array", **{**_TOKEN_IDS, "maxItems": MAX_LISTED_TOKENS})]
_AllowedTokenIds = Annotated[
    list[int] | None, _schema("array", items=_TOKEN_IDS["items"], minItems=1, maxItems=MAX_LISTED_TOKENS)
]
_NumLogprobs = Annotated[int | None, _schema("integer", minimum=0, maximum=MAX_LOGPROBS)]
_Penalty = Annotated[float | None, _schema("number", minimum=-2, maximum=2)]
_Share = Annotated[float | None, _schema("number", minimum=0, maximum=1)]
_MaxTokens = Annotated[int | None, _schema("integer", minimum=1, maximum=2**31 - 1)]


class StreamOptions(BaseModel):
    """What a stream carries besides the text."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


# a reference would point nowhere once the schema is part of the API's
_INLINE_STREAM_OPTIONS = _schema("object", properties={"include_usage": {"type": ["boolean", "null"]}})

_INLINE_SPECULATION = _schema(
    "object",
    properties={
        "mode": {"enum": [*MODES, None]},
        "max_draft_len": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_DRAFT_LEN},
    },
    additionalProperties=False,
)
_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_INLINE_PREDICTION = _schema(
    "object",
    properties={
        "type": {"const": "content"},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]},
    },
    required=["type", "content"],
)

_SAMPLING = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "seed",
    "min_tokens",
    "stop",
    "include_stop_str_in_output",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
)
"""Fields that are those of `SamplingParams`."""


class GenerationRequest(BaseModel):
    """What both endpoints take. Unsupported fields that change the meaning are refused; unknown ones are ignored."""

    model_config = ConfigDict(strict=True, extra="allow", hide_input_in_errors=True)

    model: str
    stream: bool | None = None
    stream_options: Annotated[StreamOptions | None, _INLINE_STREAM_OPTIONS] = None
    n: Annotated[int | None, _schema("integer", minimum=1, maximum=MAX_CHOICES)] = None
    max_tokens: _MaxTokens = None
    min_tokens: Annotated[int | None, _schema("integer", minimum=0, maximum=2**31 - 1)] = None
    temperature: Annotated[float | None, _schema("number", minimum=0, maximum=2)] = None
    top_p: Annotated[float | None, _schema("number", exclusiveMinimum=0, maximum=1)] = None
    top_k: Annotated[int | None, _schema("integer", minimum=-1, maximum=2**31 - 1)] = None
    min_p: _Share = None
    repetition_penalty: Annotated[float | None, _schema("number", minimum=0.01, maximum=100)] = None
    presence_penalty: _Penalty = None
    frequency_penalty: _Penalty = None
    logit_bias: Annotated[dict[str, float] | None, _BIAS_SCHEMA] = None
    allowed_token_ids: _AllowedTokenIds = None
    seed: Annotated[int | None, _schema("integer", minimum=0, maximum=2**63 - 1)] = None
    stop: Annotated[str | list[str] | None, BeforeValidator(_stop), _STOP_SCHEMA] = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: _TokenIds = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: _NumLogprobs = None
    truncate_prompt_tokens: Annotated[int | None, _schema("integer", minimum=-1)] = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    user: str | None = Field(
        None, description="Whose request it is: users share what is served. Without it, the address it came from."
    )
    speculation: Annotated[dict[str, Any] | None, _INLINE_SPECULATION] = Field(
        None, description="How this request drafts, within what the server allows; max_draft_len is in [0, 64]."
    )
    expert_budget: Annotated[str | None, _schema("string", enum=list(BUDGETS))] = Field(
        None, description="auto: drafts are verified within the server's budget of experts, if any; off: exactly."
    )
    prediction: Annotated[dict[str, Any] | None, _INLINE_PREDICTION] = Field(
        None, description="What the output is expected to be: drafts are taken from it first."
    )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def max_tokens_field(self) -> str:
        """The name under which the request limits its output."""
        return "max_tokens"

    @property
    def default_max_tokens(self) -> int | None:
        """The limit of a request that names none; None is all the room there is."""
        return None

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to show beside each output token; None shows nothing."""

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
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs: only allowed when stream is not true")

    def sampling_params(self) -> SamplingParams:
        """Return what the request asks of sampling; raises ``ValueError`` naming the field and its valid range."""
        given = {name: getattr(self, name) for name in _SAMPLING}
        given |= {"max_tokens": self.limit, "logprobs": self.num_logprobs, "prompt_logprobs": self.num_prompt_logprobs}
        return SamplingParams.from_kwargs(**{name: value for name, value in given.items() if value is not None})

    def speculation_options(self) -> SpeculationOptions:
        """Return what the request says of drafting, less its prediction; raises ``ValueError`` naming the field."""
        options = SpeculationOptions.from_mapping(self.speculation or {})
        return options if self.expert_budget is None else replace(options, expert_budget=self.expert_budget)

    def prediction_text(self) -> str:
        """Return the output that the request expects, empty for none; raises ``ValueError`` naming the field."""
        return "" if self.prediction is None else prediction_text(self.prediction)

    @property
    def limit(self) -> int | None:
        """Most output tokens, if the request says so."""
        return self.max_tokens

    @property
    def num_prompt_logprobs(self) -> int | None:
        """How many of the likeliest tokens to find for each prompt token; None finds nothing."""
        return self.prompt_logprobs


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[str | list[Any], BeforeValidator(_prompt), _PROMPT_SCHEMA]
    max_tokens: Annotated[int | None, _schema("integer", minimum=0, maximum=2**31 - 1)] = Field(
        None, description="0 only with echo or prompt_logprobs."
    )
    echo: bool | None = None
    logprobs: _NumLogprobs = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        return [self.prompt] if isinstance(self.prompt, str) or _is_token_ids(self.prompt) else self.prompt

    @property
    def default_max_tokens(self) -> int | None:
        """The limit of a request that names none."""
        return DEFAULT_MAX_TOKENS

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to show beside each token; None shows nothing."""
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """How many of the likeliest tokens to find for each prompt token; None finds nothing."""
        if self.echo and (self.logprobs is not None or self.max_tokens == 0):
            return max(self.logprobs or 0, self.prompt_logprobs or 0)
        return self.prompt_logprobs

    def check_supported(self) -> None:
        """Raise ``ValueError`` naming the field if the request asks for something that is not supported."""
        super().check_supported()
        if len(self.prompts) * (self.n or 1) > MAX_OUTPUTS:
            raise ValueError(f"n: {len(self.prompts)} prompts x {self.n} are more than {MAX_OUTPUTS} outputs")


class ChatCompletionRequest(GenerationRequest):
    """The body of POST /v1/chat/completions. `ChatTokenizer` checks the messages."""

    messages: list[Any] = Field(
        description="Each with role (system, user, assistant) and content (string or text parts)."
    )
    max_completion_tokens: _MaxTokens = None
    logprobs: bool | None = None
    top_logprobs: _NumLogprobs = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to show beside each output token; None shows nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check_supported(self) -> None:
        """Raise ``ValueError`` naming the field if the request asks for something that is not supported."""
        super().check_supported()
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_completion_tokens: differs from max_tokens; send one of them")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise ValueError(f"top_logprobs: {self.top_logprobs} is not an integer in [0, {MAX_LOGPROBS}]")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only allowed when logprobs is true")
        if self.limit == 0:
            raise ValueError(f"{self.max_tokens_field}: expected at least 1")
        check_turn(self.add_generation_prompt, self.continue_final_message)

    @property
    def max_tokens_field(self) -> str:
        """The name under which the request limits its output."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def limit(self) -> int | None:
        """Most output tokens, if the request says so."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def check_turn(add_generation_prompt: bool | None, continue_final_message: bool | None) -> None:
    """Raise ``ValueError`` if a conversation is both to go on with its last message and to begin a new one."""
    if continue_final_message and add_generation_prompt is not False:
        raise ValueError("continue_final_message: only allowed when add_generation_prompt is false")
