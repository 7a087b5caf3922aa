"""What the engine says of a request: tokens as they are committed, and its statistics at the end."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ...workers.plan import Logprobs
from .balance import Balance
from .events import EventTotals
from .histogram import HistogramSnapshot

STOP = "stop"
LENGTH = "length"
ABORT = "abort"
ERROR = "error"
TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Exact counts of one finished request. Rows of other requests in the same steps do not count."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_steps: int
    """Steps that yielded tokens."""
    num_draft_tokens: int
    num_accepted_tokens: int
    queue_s: float
    """From arrival to admission: a rank with a place and blocks for it."""
    ttft_s: float
    """From arrival to the first token."""
    total_s: float
    """From arrival to the last token."""
    num_preemptions: int = 0
    """Times it lost its KV to older requests and was computed again."""
    num_accepted_prediction_tokens: int = 0
    """Drafted from the request's `prediction`, and right."""
    num_rejected_prediction_tokens: int = 0
    """Drafted from the request's `prediction`, and wrong or behind the end of the output."""
    phase: str = "off"
    """What decided its draft lengths last (`RequestReport.phase`)."""
    utility: float | None = None
    """Tokens per step over the step's time relative to plain decoding; None where nobody measured it."""
    baseline_s: float | None = None
    """Time of a plain step that ``utility`` was measured against."""
    num_budgeted_rows: int = 0
    """Rows that kept to a budget of experts; the answer is lossy if there are any."""
    kept_weight: float | None = None
    """Mean share of their routers' weight that the budget kept; None without such rows."""

    @property
    def mean_draft_len(self) -> float:
        """Drafted tokens per step that yielded tokens."""
        return self.num_draft_tokens / self.num_steps if self.num_steps else 0.0

    @property
    def acceptance(self) -> float:
        """Accepted share of the drafted tokens; 0 when none was drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second after the first token; over the whole request when there is but one."""
        if self.num_output_tokens > 1 and self.total_s > self.ttft_s:
            return (self.num_output_tokens - 1) / (self.total_s - self.ttft_s)
        return self.num_output_tokens / self.total_s if self.total_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class PredictionDraft:
    """What became of a draft from the request's `prediction` in one step."""

    offset: int
    """Index in the output of the step's first token."""
    num_drafted: int
    num_accepted: int
    """Of the step's tokens, the leading ones that were drafted."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step adds to one request."""

    request_id: str
    offset: int
    """Index in the output of the first of ``token_ids``: a reader drops what it has and treats a gap as an error."""
    token_ids: list[int]
    finish_reason: str | None = None
    """stop, length, abort, timeout or error once the request has ended."""
    stop_token_id: int | None = None
    """The EOS or stop token that ended it; it is the last of ``token_ids`` and not part of the text."""
    stats: RequestStats | None = None
    error: str | None = None
    logprobs: Logprobs | None = None
    """Of ``token_ids``, if the request asks for them."""
    prompt_logprobs: Logprobs | None = None
    """Of the prompt's tokens from the second on: with the first output, if the request asks for them."""
    num_steps: int = 1
    """Steps whose tokens these are: more than one if its reader lagged."""
    prediction_drafts: list[PredictionDraft] = field(default_factory=list)
    """One for each step that drafted from the request's `prediction`."""
    num_budgeted_rows: int = 0
    """Rows of these steps that kept to a budget of experts."""

    def followed_by(self, later: RequestOutput) -> RequestOutput:
        """Return this and the request's next output as one; this one's lists go over to it."""
        assert later.offset == self.offset + len(self.token_ids), "outputs of a request follow one another"
        # In place: a reader may lag by thousands of steps
        self.token_ids.extend(later.token_ids)
        if self.logprobs is not None and later.logprobs is not None:
            self.logprobs.extend(later.logprobs)
        self.prediction_drafts.extend(later.prediction_drafts)
        return replace(
            later,
            offset=self.offset,
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            num_steps=self.num_steps + later.num_steps,
            prediction_drafts=self.prediction_drafts,
            num_budgeted_rows=self.num_budgeted_rows + later.num_budgeted_rows,
        )


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Totals since the engine started, and its present state. Counters only grow."""

    num_steps: int
    num_failed_steps: int
    num_prompt_tokens: int
    """Prompt tokens computed, each once: a replay adds nothing."""
    num_generation_tokens: int
    num_requests_finished: dict[str, int]
    """By finish reason."""
    num_requests_refused: int
    """Requests refused because the queue was full."""
    unknown_request_fields: dict[str, int]
    """Fields of request bodies that no API we know has, by endpoint."""
    num_requests_running: int
    num_requests_waiting: int
    num_preemptions: int
    """Times a running request lost its KV to older ones and waited again."""
    events: EventTotals
    """Faults, recoveries and rebalances of the gang."""
    balance: Balance | None
    """Of experts; None where they stay where they are."""
    num_requests_resumed: int
    """Requests that another coordinator had begun."""
    num_kv_blocks: int
    num_kv_blocks_used: int
    spec_decode_num_drafts: int
    spec_decode_num_draft_tokens: int
    spec_decode_num_accepted_tokens: int
    spec_decode_num_accepted_tokens_per_pos: list[int]
    spec_decode_draft_len: HistogramSnapshot
    """Tokens drafted by each decoding request in each step."""
    spec_decode_utility: HistogramSnapshot
    """Of finished requests, where it was measured."""
    spec_decode_phases: dict[str, int]
    """Decoding requests by `RequestReport.phase`, as of at most a second ago."""
    num_decode_steps: int
    """Steps without prompt rows; the next three describe these alone."""
    decode_experts_per_layer: float
    """Mean distinct experts computed per MoE layer and step, all ranks together."""
    decode_tokens: int
    decode_payload_bytes: int
    rows_sent: int
    """Rows sent between ranks, all layers."""
    payload_bytes: int
    wire_bytes: int
    budgeted_rows: int
    """Rows that kept to a budget of experts, once for each layer."""
    kept_weight: float
    """Summed over those: the share of their routers' weight that the budget kept."""
    budget_steps: dict[str, int]
    """Steps in which rows kept to a budget of experts, by budget."""
    by_rank: dict[str, list[float]]
    """Totals of each count of `LayerCounts` by rank, over all layers."""
    by_layer: dict[str, list[float]]
    """The same by MoE layer, over all ranks."""
    step_wall_s: float
    """Time spent in steps."""
    latencies: dict[str, HistogramSnapshot]
    """Seconds, by the name of what was measured (`Latencies`)."""
