"""The contract of one step: what the coordinator asks of every rank, and what each rank answers.

A step is the only unit of work and verification its only form: a request contributes rows (a prompt chunk, or its
last token plus drafts). Plans carry all lengths; ranks keep none, so a step that fails anywhere is simply planned
again from ``committed_len`` under the next generation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .sampling_params import TokenSampling

EAGER = "eager"


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """One request's N rows in one step.

    Rows form a tree: ``parents[j]`` is the row (of this request, < j) that row j continues, -1 the last committed
    token. The KV of row j is written to slot ``committed_len + j``; its position is ``committed_len + depth - 1``.
    Rows before ``first_sampled_row`` are known context; rows from it on each yield a sampled token, and a row whose
    token equals the one sampled at its parent is an accepted draft.
    """

    request_id: int
    committed_len: int
    """Tokens whose KV is valid before this step."""
    first_block: int
    """Where ``new_blocks`` start in the request's block table; the table is cut there first."""
    new_blocks: list[int]
    token_ids: list[int]
    parents: list[int]
    first_sampled_row: int
    """N when the rows are a prompt chunk that is not the last."""
    sampling: TokenSampling


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank does in one step. All ranks get the same header, so they run the same collectives."""

    generation: int
    """Raised whenever steps are discarded; a rank drops its block tables when it changes."""
    step_id: int
    row_bucket: int
    """Most rows any rank runs in this step; at least 1: an idle rank runs one padding row."""
    mode: str = EAGER
    requests: list[RequestPlan] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    """Requests whose block tables may be forgotten."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of all ranks, ``ranks[r]`` being rank r's part."""

    generation: int
    step_id: int
    ranks: list[RankPlan]


@dataclass(frozen=True, slots=True)
class LayerCounts:
    """Exact counts of one rank's step, one entry per MoE layer (L). Padding rows count nowhere."""

    rows: list[int]
    """Rows routed on this rank (its own requests')."""
    experts: list[int]
    """Distinct experts this rank owns and computed: weights read once each."""
    rows_sent: list[int]
    """Rows sent to other ranks, a row counting once per rank it visits."""
    payload_bytes: list[int]
    """Hidden states sent and partial sums received for ``rows_sent``: 2 x H x itemsize each."""
    wire_bytes: list[int]
    """All bytes this rank sent to other ranks, counts, expert ids and weights included."""


@dataclass(frozen=True, slots=True)
class RankResult:
    """One rank's answer to one step."""

    generation: int
    step_id: int
    rank: int
    token_ids: list[list[int]]
    """Per request of the plan: its accepted drafts and the token after them; empty for a chunk without sample."""
    counts: LayerCounts
    num_collectives: int
    collectives_crc: int
    """Checksum of the sequence of collectives; equal on all ranks, or the step has failed."""
    thread_time_s: float
    """CPU time of the rank's thread in this step."""


@dataclass(frozen=True, slots=True)
class RankError:
    """A rank's answer when it could not complete a step."""

    generation: int
    step_id: int
    rank: int
    message: str


@dataclass(frozen=True, slots=True)
class StepResult:
    """All ranks' answers, in rank order."""

    ranks: list[RankResult]
    wall_s: float


class StepFailedError(Exception):
    """A step did not complete on every rank. Nothing of it may be published; plan it again."""
