"""What a request asks of sampling, and the part of it a rank needs."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOP_CHARS = 1024
"""Longest stop string: each choice of a request has a copy of all, on its way to the engine and in its detokenizer."""
MAX_LISTED_TOKENS = 1024
"""Most token ids a request may list in one field: they travel with every step."""


@dataclass(frozen=True, slots=True)
class LogitAdjustments:
    """What is done to a row's logits before temperature and filters. Order and meaning are vLLM's."""

    allowed_token_ids: tuple[int, ...] = ()
    """All others are ruled out; empty allows all."""
    late_token_ids: tuple[int, ...] = ()
    """EOS and stop tokens, ruled out at positions before ``late_from``."""
    late_from: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit)."""
    repetition_penalty: float = 1.0
    """Divides the positive and multiplies the negative logits of tokens in the prompt or the output."""
    frequency_penalty: float = 0.0
    """Subtracted once for every time that a token stands in the output."""
    presence_penalty: float = 0.0
    """Subtracted from tokens that stand in the output."""

    @property
    def has_penalties(self) -> bool:
        """Whether the text so far matters."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


_NO_ADJUSTMENTS = LogitAdjustments()


@dataclass(frozen=True, slots=True)
class TokenSampling:
    """How one request's next token is chosen; travels with every row group of a plan.

    ``seed`` and ``choice`` key the noise (``kernels.philox``); ``temperature`` 0 is greedy and needs none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    choice: int = 0
    adjustments: LogitAdjustments | None = None
    """None when logits are taken as they are."""
    logprobs: int | None = None
    """Report the log-probability of each sampled token and of this many of the likeliest; None reports nothing."""
    prompt_logprobs: int | None = None
    """The same for a plan's ``targets``."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request is decoded. Names, defaults and ranges are those of vLLM and OpenAI.

    Raises ``ValueError`` naming the field and its valid range.
    """

    n: int = 1
    """Outputs of each prompt, in [1, 128]; they differ by their noise."""
    choice: int = 0
    """Number of the first output: with the same seed, output i is the same however many are asked for."""
    temperature: float = 1.0
    """0 is greedy; in [0, 2]."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this; in (0, 1]."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one; in [0, 1]."""
    repetition_penalty: float = 1.0
    """Above 1 discourages tokens of prompt and output; in [0.01, 100]."""
    presence_penalty: float = 0.0
    """Above 0 discourages tokens of the output; in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Above 0 discourages tokens of the output by how often they came; in [-2, 2]."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id to what is added to its logit, in [-100, 100]; at most 1024 entries."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only tokens the output may have: 1 to 1024."""
    seed: int | None = None
    """Same seed, same tokens, whatever the batch or the draft length; drawn when absent; in [0, 2**63)."""
    max_tokens: int | None = None
    """At most this many tokens; None runs to ``max_model_len``. 0 only with ``prompt_logprobs``, else at least 1."""
    min_tokens: int = 0
    """EOS, stop tokens and stop strings do not end the output before it has this many; in [0, max_tokens]."""
    stop: tuple[str, ...] = ()
    """Up to 16 strings of 1 to 1024 characters; output ends before the first that appears."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the token that ended the output, in the text."""
    stop_token_ids: tuple[int, ...] = ()
    """Up to 1024 token ids that end the output, as EOS does."""
    ignore_eos: bool = False
    """Go on after EOS until ``max_tokens``."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    logprobs: int | None = None
    """Report the log-probability of each output token and of this many of the likeliest; in [0, 20]."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, all but the first."""

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_CHOICES)
        _integer("choice", self.choice, 0, 2**31 - 1)
        _number("temperature", self.temperature, 0.0, 2.0)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids, 1))
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1 if self.prompt_logprobs is None else 0, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens: {self.min_tokens} is not in [0, max_tokens={self.max_tokens}]")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids, 0))
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not true or false")

    @classmethod
    def from_kwargs(cls, **kwargs: object) -> SamplingParams:
        """Build from keyword arguments; an unknown one is refused with the valid ones listed."""
        valid = [f.name for f in fields(cls)]
        unknown = sorted(set(kwargs) - set(valid))
        if unknown:
            raise ValueError(f"unknown sampling parameter {', '.join(unknown)}; valid: {', '.join(valid)}")
        return cls(**kwargs)  # type: ignore[arg-type]

    def with_seed(self) -> SamplingParams:
        """Return these with a seed drawn if they need one and have none."""
        return replace(self, seed=secrets.randbits(63)) if self.seed is None and self.temperature > 0 else self

    def choices(self) -> list[SamplingParams]:
        """Return the ``n`` requests this stands for, each of one output; ``seed`` must have been drawn."""
        return [replace(self, n=1, choice=self.choice + i) for i in range(self.n)]

    def token_sampling(self, num_prompt_tokens: int = 0, eos_token_ids: Sequence[int] = ()) -> TokenSampling:
        """Return what a rank needs; ``seed`` must have been drawn unless decoding is greedy."""
        assert self.seed is not None or self.temperature == 0, "the seed is drawn before a request is planned"
        adjustments = LogitAdjustments(
            allowed_token_ids=self.allowed_token_ids or (),
            late_token_ids=(*eos_token_ids, *self.stop_token_ids) if self.min_tokens else (),
            late_from=num_prompt_tokens + self.min_tokens if self.min_tokens else 0,
            logit_bias=tuple(self.logit_bias.items()),
            repetition_penalty=float(self.repetition_penalty),
            frequency_penalty=float(self.frequency_penalty),
            presence_penalty=float(self.presence_penalty),
        )
        return TokenSampling(
            temperature=float(self.temperature),
            top_k=max(self.top_k, 0),
            top_p=float(self.top_p),
            min_p=float(self.min_p),
            seed=self.seed or 0,
            choice=self.choice,
            adjustments=None if adjustments == _NO_ADJUSTMENTS else adjustments,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )

    def check_vocabulary(self, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Raise ``ValueError`` naming the field if a token id is not the model's, or if no token could be chosen."""
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            for token_id in getattr(self, name) or ():
                if token_id >= vocab_size:
                    raise ValueError(f"{name}: {token_id} is not in [0, {vocab_size - 1}]")
        late = {*eos_token_ids, *self.stop_token_ids}
        if self.min_tokens and self.allowed_token_ids is not None and late.issuperset(self.allowed_token_ids):
            raise ValueError("allowed_token_ids: expected one that does not end the output, as min_tokens is above 0")
        if self.min_tokens and len(late) >= vocab_size:
            raise ValueError("stop_token_ids: expected fewer than the vocabulary, as min_tokens is above 0")


def _stop_strings(value: object) -> tuple[str, ...]:
    if (
        not isinstance(value, list | tuple)
        or len(value) > 16
        or not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARS for text in value)
    ):
        raise ValueError(f"stop: expected at most 16 strings of 1 to {MAX_STOP_CHARS} characters, got {value!r:.200}")
    return tuple(value)


def _logit_bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping) or len(value) > MAX_LISTED_TOKENS:
        raise ValueError(f"logit_bias: expected at most {MAX_LISTED_TOKENS} token ids with a bias each")
    result = {}
    for key, bias in value.items():
        # JSON has strings for keys
        token_id = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 11 else key
        _integer("logit_bias", token_id, 0, 2**31 - 1)
        _number("logit_bias", bias, -100.0, 100.0)
        result[token_id] = float(bias)
    return result


def _token_ids(name: str, value: object, low: int) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not low <= len(value) <= MAX_LISTED_TOKENS:
        raise ValueError(f"{name}: expected a list of {low} to {MAX_LISTED_TOKENS} token ids")
    for token_id in value:
        _integer(name, token_id, 0, 2**31 - 1)
    return tuple(value)


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    bracket = "(" if open_low else "["
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not low <= value <= high
        or (open_low and value == low)
    ):
        raise ValueError(f"{name}: {value!r} is not a number in {bracket}{low:g}, {high:g}]")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}: {value!r} is not an integer in [{low}, {high}]")
