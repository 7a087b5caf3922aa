"""What a request asks of sampling, and the part of it a rank needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


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


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request is decoded. Names, defaults and ranges are those of vLLM and OpenAI.

    Raises ``ValueError`` naming the field and its valid range.
    """

    temperature: float = 1.0
    """0 is greedy; in [0, 2]."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this; in (0, 1]."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one; in [0, 1]."""
    seed: int | None = None
    """Same seed, same tokens, whatever the batch or the draft length; drawn when absent; in [0, 2**63)."""
    max_tokens: int | None = None
    """At most this many tokens; None runs to ``max_model_len``; at least 1."""
    stop: tuple[str, ...] = ()
    """Up to 16 non-empty strings; output ends before the first that appears."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the output, as EOS does."""
    ignore_eos: bool = False
    """Go on after EOS until ``max_tokens``."""

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, 2.0)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**63 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if not isinstance(self.stop, list | tuple):
            raise ValueError(f"stop: expected at most 16 non-empty strings, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        if len(self.stop) > 16 or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop: expected at most 16 non-empty strings, got {self.stop!r}")
        if not isinstance(self.stop_token_ids, list | tuple):
            raise ValueError(f"stop_token_ids: expected a list of token ids, got {self.stop_token_ids!r}")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token_id in self.stop_token_ids:
            _integer("stop_token_ids", token_id, 0, 2**31 - 1)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos: {self.ignore_eos!r} is not true or false")

    @classmethod
    def from_kwargs(cls, **kwargs: object) -> SamplingParams:
        """Build from keyword arguments; an unknown one is refused with the valid ones listed."""
        valid = [f.name for f in fields(cls)]
        unknown = sorted(set(kwargs) - set(valid))
        if unknown:
            raise ValueError(f"unknown sampling parameter {', '.join(unknown)}; valid: {', '.join(valid)}")
        return cls(**kwargs)  # type: ignore[arg-type]

    def token_sampling(self, choice: int = 0) -> TokenSampling:
        """Return what a rank needs; ``seed`` must have been drawn unless decoding is greedy."""
        assert self.seed is not None or self.temperature == 0, "the seed is drawn before a request is planned"
        return TokenSampling(
            temperature=float(self.temperature),
            top_k=max(self.top_k, 0),
            top_p=float(self.top_p),
            min_p=float(self.min_p),
            seed=self.seed or 0,
            choice=choice,
        )


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
