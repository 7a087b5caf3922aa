"""What a request came to, as every client sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

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
    mean_draft_len: float | None
    """Draft tokens per step."""
    phase: str | None
    """What chose the draft lengths at the end: off, fixed, shadow, or cascade's baseline, test, set or disabled."""
    utility: float | None
    """Tokens per step over the step's time relative to plain decoding: above 1 speculation has paid.

    None where nobody measures it (off, fixed) or has yet.
    """
    baseline_s: float | None
    """Time of a plain step that ``utility`` was measured against."""
    accepted_prediction_tokens: int
    """Drafted from the request's `prediction`, and in the output."""
    rejected_prediction_tokens: int
    """Drafted from the request's `prediction`, and not in the output."""
    budgeted_rows: int
    """Rows that kept to the server's budget of experts."""
    kept_weight: float | None
    """Mean share of their routers' weight that the budget kept; None without such rows."""
    lossy: bool
    """Whether there are any: if not, the budget has changed nothing."""
    tokens_per_s: float
    """Output tokens per second after the first token; over the whole request when there is but one."""
    ttft_s: float
    """From arrival to the first token."""
    queue_s: float | None
    """From arrival to the first step."""

    @classmethod
    def from_request(
        cls,
        stats: RequestStats,
        seed: int | None,
        accepted_prediction_tokens: int,
        rejected_prediction_tokens: int,
    ) -> GenerationStats:
        """Build from the engine's exact counts, and those of the `prediction` in the text as far as it was read."""
        return cls(
            seed=seed,
            steps=stats.num_steps,
            draft_tokens=stats.num_draft_tokens,
            accepted_tokens=stats.num_accepted_tokens,
            acceptance=stats.acceptance,
            mean_draft_len=stats.mean_draft_len,
            phase=stats.phase,
            utility=stats.utility,
            baseline_s=stats.baseline_s,
            accepted_prediction_tokens=accepted_prediction_tokens,
            rejected_prediction_tokens=rejected_prediction_tokens,
            budgeted_rows=stats.num_budgeted_rows,
            kept_weight=stats.kept_weight,
            lossy=stats.num_budgeted_rows > 0,
            tokens_per_s=stats.tokens_per_s,
            ttft_s=stats.ttft_s,
            queue_s=stats.queue_s,
        )

    @classmethod
    def together(cls, parts: Sequence[GenerationStats]) -> GenerationStats:
        """Return what several generations that ran side by side come to.

        ``seed`` and ``phase`` are None where they differ; ``utility`` and ``baseline_s`` are means.
        """
        if len(parts) == 1:
            return parts[0]

        def total(counts: list[int | None]) -> int | None:
            return None if None in counts else sum(count or 0 for count in counts)

        drafted, accepted = total([p.draft_tokens for p in parts]), total([p.accepted_tokens for p in parts])
        steps = sum(p.steps for p in parts)
        budgeted_rows = sum(p.budgeted_rows for p in parts)
        waits = [p.queue_s for p in parts if p.queue_s is not None]
        return cls(
            seed=parts[0].seed if len({p.seed for p in parts}) == 1 else None,
            steps=steps,
            draft_tokens=drafted,
            accepted_tokens=accepted,
            acceptance=None if drafted is None or accepted is None else accepted / drafted if drafted else 0.0,
            mean_draft_len=None if drafted is None else drafted / steps if steps else 0.0,
            phase=parts[0].phase if len({p.phase for p in parts}) == 1 else None,
            utility=_mean([p.utility for p in parts]),
            baseline_s=_mean([p.baseline_s for p in parts]),
            accepted_prediction_tokens=sum(p.accepted_prediction_tokens for p in parts),
            rejected_prediction_tokens=sum(p.rejected_prediction_tokens for p in parts),
            budgeted_rows=budgeted_rows,
            kept_weight=_kept_weight(parts),
            lossy=budgeted_rows > 0,
            tokens_per_s=sum(p.tokens_per_s for p in parts),
            ttft_s=min(p.ttft_s for p in parts),
            queue_s=min(waits, default=None),
        )


def _kept_weight(parts: Sequence[GenerationStats]) -> float | None:
    """Return the mean over all budgeted rows, None where there are none or those of a part are not known."""
    lossy = [part for part in parts if part.lossy]
    known = [part.kept_weight * part.budgeted_rows for part in lossy if part.kept_weight is not None]
    return sum(known) / sum(part.budgeted_rows for part in lossy) if lossy and len(known) == len(lossy) else None


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of those that are known."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


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
