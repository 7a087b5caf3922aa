"""How requests are answered in the OpenAI API's words; the two formats are in modules of their own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from openai.types import CompletionUsage
from openai.types.completion_usage import CompletionTokensDetails
from pydantic import BaseModel

from .generation import Generation, GenerationStats, TokenLogprob
from .prompts import EncodedPrompt
from .text_stream import TextDelta


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """What one HTTP request's answer is to hold."""

    request_id: str
    model: str
    """The name that the request used."""
    system_fingerprint: str
    prompts: Sequence[EncodedPrompt]
    n: int = 1
    """Choices of each prompt; choice j is the prompt j // n's."""
    include_usage: bool = False
    """Whether a stream ends with a chunk of usage."""
    echo: bool = False
    """Whether choices begin with their prompt."""
    num_logprobs: int | None = None
    """How many of the likeliest tokens to show in each place; None shows no log-probabilities."""
    num_prompt_logprobs: int | None = None
    """The same for prompts, in vLLM's form."""
    return_token_ids: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def num_choices(self) -> int:
        """Choices of all prompts."""
        return self.n * len(self.prompts)

    def prompt(self, index: int) -> EncodedPrompt:
        """Return the prompt of choice ``index``."""
        return self.prompts[index // self.n]


class ResponseFormat(Protocol):
    """How one request is answered: all methods return JSON."""

    options: AnswerOptions

    def whole(self, generations: Sequence[Generation]) -> str:
        """Return the body of an answer that is not streamed."""
        ...

    def opening(self) -> list[str]:
        """Return the chunks that precede the text."""
        ...

    def delta(self, index: int, delta: TextDelta) -> str | None:
        """Return a chunk of choice ``index``; None if there is nothing to say."""
        ...

    def final(self, index: int, generation: Generation) -> str:
        """Return the chunk with a choice's finish reason and statistics."""
        ...

    def usage(self, generations: Sequence[Generation]) -> str:
        """Return the chunk that ``stream_options.include_usage`` asks for."""
        ...


def accounts(options: AnswerOptions, generations: Sequence[Generation]) -> dict[str, Any]:
    """Return usage and statistics of all choices; a prompt counts once."""
    num_prompt_tokens = sum(len(prompt.token_ids) for prompt in options.prompts)
    num_output_tokens = sum(generation.num_output_tokens for generation in generations)
    stats = GenerationStats.together([generation.stats for generation in generations])
    usage = CompletionUsage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_output_tokens,
        total_tokens=num_prompt_tokens + num_output_tokens,
        completion_tokens_details=CompletionTokensDetails(
            accepted_prediction_tokens=stats.accepted_prediction_tokens,
            rejected_prediction_tokens=stats.rejected_prediction_tokens,
        ),
    )
    return {"usage": usage, "penstock": asdict(stats)}


def own_stats(options: AnswerOptions, generation: Generation) -> dict[str, Any]:
    """Return what a choice says of itself where it is not the only one."""
    return {"penstock": asdict(generation.stats)} if options.num_choices > 1 else {}


def prompt_logprobs(tokens: Sequence[TokenLogprob], num_top: int) -> list[dict[str, Any] | None]:
    """Return vLLM's ``prompt_logprobs``: by token id, the prompt's own and then the likeliest; null for the first."""
    result: list[dict[str, Any] | None] = []
    for token in tokens:
        places: dict[str, Any] = {}
        for entry in (token, *token.top_logprobs[:num_top]):
            shown = {"logprob": entry.logprob, "rank": entry.rank, "decoded_token": entry.token}
            places.setdefault(str(entry.token_id), shown)
        result.append(places if token.logprob is not None else None)
    return result


def to_json(body: BaseModel) -> str:
    """Return ``body`` without the fields that were not set."""
    # warnings: a chunk's finish_reason is null until the last, which the completion type does not say
    return body.model_dump_json(exclude_unset=True, warnings=False)
