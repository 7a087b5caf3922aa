"""What a request came to, as every client sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..engine.output import RequestStats


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """How one generation went. What only the engine counts is None if a stop string ended the request."""

    seed: int | None
    """The seed that repeats this output; None for greedy decoding."""
    steps: int
    """Steps that yielded tokens."""
    draft_tokens: int | None
    accepted_tokens: int | None
    acceptance: float | None
    """Accepted share of the draft tokens; 0 when none was drafted."""
    tokens_per_s: float
    """Output tokens per second after the first token; over the whole request when there is but one."""
    ttft_s: float
    """From arrival to the first token."""
    queue_s: float | None
    """From arrival to the first step."""

    @classmethod
    def from_request(cls, stats: RequestStats, seed: int | None) -> GenerationStats:
        """Build from the engine's exact counts."""
        return cls(
            seed=seed,
            steps=stats.num_steps,
            draft_tokens=stats.num_draft_tokens,
            accepted_tokens=stats.num_accepted_tokens,
            acceptance=stats.acceptance,
            tokens_per_s=stats.tokens_per_s,
            ttft_s=stats.ttft_s,
            queue_s=stats.queue_s,
        )

    @classmethod
    def together(cls, parts: Sequence[GenerationStats]) -> GenerationStats:
        """Return what several generations that ran side by side come to; ``seed`` is None where they differ."""
        if len(parts) == 1:
            return parts[0]

        def total(counts: list[int | None]) -> int | None:
            return None if None in counts else sum(count or 0 for count in counts)

        drafted, accepted = total([p.draft_tokens for p in parts]), total([p.accepted_tokens for p in parts])
        waits = [p.queue_s for p in parts if p.queue_s is not None]
        return cls(
            seed=parts[0].seed if len({p.seed for p in parts}) == 1 else None,
            steps=sum(p.steps for p in parts),
            draft_tokens=drafted,
            accepted_tokens=accepted,
            acceptance=None if drafted is None or accepted is None else accepted / drafted if drafted else 0.0,
            tokens_per_s=sum(p.tokens_per_s for p in parts),
            ttft_s=min(p.ttft_s for p in parts),
            queue_s=min(waits, default=None),
        )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token and how likely the model thought it, under its own distribution."""

    token: str
    r"""Its text, or ``bytes:\xe6\xb0`` where that is not whole characters."""
    bytes: list[int] | None
    logprob: float | None
    """Natural logarithm; None for the first token of a prompt."""
    token_id: int | None = None
    """None from a server that does not say."""
    rank: int | None = None
    """1 for the likeliest token; None from a server that does not say."""
    text_offset: int = 0
    """Characters before it in the output, or in the prompt."""
    top_logprobs: list[TokenLogprob] = field(default_factory=list)
    """The likeliest tokens in its place, best first."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One finished output."""

    text: str
    num_prompt_tokens: int
    num_output_tokens: int
    """Tokens generated, the one that ended the output (EOS, or the last of a stop string) included."""
    finish_reason: str
    """stop or length."""
    stats: GenerationStats
    choice: int = 0
    """Which of the prompt's outputs this is."""
    token_ids: list[int] | None = None
    """The tokens generated; None from a server that does not say."""
    logprobs: list[TokenLogprob] | None = None
    """Of the tokens generated, if they were asked for."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """Of the prompt's tokens, if they were asked for."""
