"""One request as the coordinator sees it. Ranks know none of this but what a plan tells them."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...workers.plan import KeptWeight, Logprobs, TextUpdate
from ...workers.sampling_params import SamplingParams, TokenSampling
from ..speculation.controller import RequestReport
from ..speculation.options import SpeculationOptions
from ..speculation.prediction import PREDICTION
from .output import PredictionDraft, RequestStats


@dataclass(slots=True, eq=False)
class Request:
    """State of a live request. Only ``Engine`` and ``Scheduler`` change it."""

    request_id: str
    key: int
    """The engine's own number for it, in order of arrival, unique for the engine's life; what plans carry."""
    sampling: SamplingParams
    speculation: SpeculationOptions
    token_sampling: TokenSampling
    token_ids: list[int]
    """Prompt and output so far."""
    num_prompt_tokens: int
    max_total_tokens: int
    """Prompt plus the most output it may have."""
    arrival_s: float
    client: str = ""
    """Whose it is: clients share what is served."""
    rank: int = -1
    """The rank that holds its KV; -1 while it waits."""
    committed_len: int = 0
    """Tokens whose KV is valid."""
    blocks: list[int] = field(default_factory=list)
    num_blocks_sent: int = 0
    """Blocks of ``blocks`` its rank has been told of in this generation."""
    num_tokens_sent: int = 0
    """Tokens of ``token_ids`` its rank has been told of as its text; only penalties need it there."""
    prompt_logprobs: Logprobs | None = None
    """Of the prompt's tokens from the second on, as far as they have been computed."""
    admitted_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_prompt_computed: int = 0
    """Prompt tokens whose KV has been valid at some time."""
    num_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    draft_source: str = ""
    """Name of the drafter whose tokens are being verified (`Evidence.source`)."""
    num_prediction_draft_tokens: int = 0
    num_prediction_accepted_tokens: int = 0
    has_last_rows: bool = False
    """The step that runs brings it to its end, as far as its length says; only while the next one is planned."""
    was_admitted: bool = False
    """It has had a rank, and waits before all that have not."""
    num_preemptions: int = 0
    """Times it lost its KV to older requests and was replayed."""
    num_budgeted_rows: int = 0
    """Rows that kept to a budget of experts."""
    kept_weight: float = 0.0
    """Summed over those rows: the share of their routers' weight that the budget kept."""

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Known tokens without KV: 1 while decoding, more while the prompt is computed or the request replayed."""
        return len(self.token_ids) - self.committed_len

    @property
    def is_decoding(self) -> bool:
        """Only its last token awaits a row, so drafts may follow it."""
        return self.num_pending_tokens == 1 and self.num_output_tokens > 0

    @property
    def num_tokens_left(self) -> int:
        """Tokens it may still generate; 0 from the start when only its prompt is to be scored."""
        return self.max_total_tokens - len(self.token_ids)

    @property
    def is_complete(self) -> bool:
        """All KV is there and no token is wanted."""
        return not self.num_pending_tokens and not self.num_tokens_left

    @property
    def has_penalties(self) -> bool:
        """Whether its rank must know its whole text."""
        adjustments = self.token_sampling.adjustments
        return adjustments is not None and adjustments.has_penalties

    def targets(self, num_rows: int) -> list[int]:
        """Return the prompt tokens that follow its next ``num_rows`` rows, if their log-probabilities are wanted."""
        if self.token_sampling.prompt_logprobs is None:
            return []
        start = self.committed_len + 1
        return self.token_ids[start : min(start + num_rows, self.num_prompt_tokens)]

    def text_update(self, *, is_new: bool) -> TextUpdate | None:
        """Return what its rank must be told of its text now; ``is_new``: the rank knows nothing of this request."""
        if not self.has_penalties:
            return None
        first, self.num_tokens_sent = 0 if is_new else self.num_tokens_sent, len(self.token_ids)
        return TextUpdate(self.num_prompt_tokens, first, self.token_ids[first:])

    def take_prompt_logprobs(self, logprobs: Logprobs) -> None:
        """Add those of a chunk's targets, which begin after ``committed_len``; what is known already is dropped."""
        if self.prompt_logprobs is None:
            self.prompt_logprobs = Logprobs([], [], [])
        self.prompt_logprobs.extend(logprobs.cut(len(self.prompt_logprobs) - self.committed_len))

    def take_step(self, offset: int, num_drafted: int, num_accepted: int) -> list[PredictionDraft]:
        """Count a step that yielded tokens from ``offset`` in the output; return what it drafted from a prediction."""
        self.num_steps += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted
        if not num_drafted or self.draft_source != PREDICTION:
            return []
        self.num_prediction_draft_tokens += num_drafted
        self.num_prediction_accepted_tokens += num_accepted
        return [PredictionDraft(offset, num_drafted, num_accepted)]

    def take_kept_weight(self, kept: KeptWeight) -> None:
        """Count what a step's budget left to it."""
        self.num_budgeted_rows += kept.num_rows
        self.kept_weight += kept.num_rows * kept.share

    def stats(self, now: float, report: RequestReport) -> RequestStats:
        """Return its counts at time ``now``, and what the controller knows of it."""
        first_token = self.first_token_s if self.first_token_s is not None else now
        admitted = self.admitted_s if self.admitted_s is not None else now
        return RequestStats(
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            num_steps=self.num_steps,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            queue_s=admitted - self.arrival_s,
            ttft_s=first_token - self.arrival_s,
            total_s=now - self.arrival_s,
            num_preemptions=self.num_preemptions,
            num_accepted_prediction_tokens=self.num_prediction_accepted_tokens,
            num_rejected_prediction_tokens=self.num_prediction_draft_tokens - self.num_prediction_accepted_tokens,
            phase=report.phase,
            utility=report.utility,
            baseline_s=report.baseline_s,
            num_budgeted_rows=self.num_budgeted_rows,
            kept_weight=self.kept_weight / self.num_budgeted_rows if self.num_budgeted_rows else None,
        )
