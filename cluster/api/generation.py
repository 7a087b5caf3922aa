"""What a request came to, as every client sees it."""

from __future__ import annotations

from dataclasses import dataclass

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
