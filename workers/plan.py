"""The contract of one step: what the coordinator asks of every rank, and what each rank answers.

A step is the only unit of work and verification its only form: a request contributes rows (a prompt chunk, or its
last token plus drafts). Plans carry all lengths; ranks keep none, so a step that fails anywhere is simply planned
again from ``committed_len`` under the next generation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..router.expert_budget import ExpertBudget
from .rebalance_plan import ExpertLoads, RebalancePlan
from .sampling_params import TokenSampling

SAMPLED_LAST = -1
"""In place of a request's first token: the one that its rank sampled for it in the step before, which the coordinator
had not heard of when it planned this one."""


@dataclass(frozen=True, slots=True)
class TextUpdate:
    """What a rank has not yet been told of a request's text, prompt and output; only penalties need it."""

    num_prompt_tokens: int
    first_token: int
    """Where ``new_tokens`` start in the text; the rank's copy is cut there first."""
    new_tokens: list[int]


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
    """N when the rows yield no token, as those of a prompt chunk that is not the last."""
    sampling: TokenSampling
    targets: list[int] = field(default_factory=list)
    """Prompt tokens whose log-probabilities are wanted: ``targets[j]`` follows row j."""
    text: TextUpdate | None = None
    """Only for requests with penalties."""
    first_budgeted_row: int | None = None
    """Rows from it on keep to the step's budget; None: none does."""
    reach: list[float] = field(default_factory=list)
    """Per budgeted row: the probability that its token is used; empty where the budget does not ask."""

    @property
    def num_sampled_rows(self) -> int:
        """Rows that yield a token."""
        return len(self.token_ids) - self.first_sampled_row

    @property
    def is_deferred(self) -> bool:
        """Whether its first token is the one that its rank sampled last."""
        return self.token_ids[0] == SAMPLED_LAST

    def filled_in(self, sampled: Mapping[int, int]) -> RequestPlan:
        """Return it with its first token known; ``sampled``: what the step before sampled last, by request."""
        if not self.is_deferred:
            return self
        return replace(self, token_ids=[sampled[self.request_id], *self.token_ids[1:]])


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes that a step is padded to: requests, rows of each, and context slots of each, whole blocks."""

    num_requests: int
    num_rows: int
    num_slots: int

    @property
    def total_rows(self) -> int:
        """All rows of a rank."""
        return self.num_requests * self.num_rows


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank does in one step. All ranks get the same header, so they run the same collectives."""

    generation: int
    """Raised whenever steps are discarded; a rank drops its block tables and texts when it changes."""
    step_id: int
    bucket: Bucket | None = None
    """What all ranks pad the step to, where they replay graphs; None for rows as they are. An idle rank runs one
    padding row."""
    requests: list[RequestPlan] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    """Requests whose block tables and texts may be forgotten."""
    budget: ExpertBudget | None = None
    """Of experts and ranks, for the requests' budgeted rows; the same on all ranks."""
    rebalance: RebalancePlan | None = None
    """None where experts stay where they are."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of all ranks, ``ranks[r]`` being rank r's part."""

    generation: int
    step_id: int
    ranks: list[RankPlan]

    @property
    def is_warm_up(self) -> bool:
        """Whether nobody has a row in it: it is run for the sake of its shape."""
        return not any(rank.requests for rank in self.ranks)


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
    budgeted_rows: list[int] = field(default_factory=list)
    """Rows of this rank that kept to a budget; empty in a step without one."""
    weight_kept: list[float] = field(default_factory=list)
    """Summed over those rows: the share of the weight of their routers' own choice that the budget kept."""


@dataclass(frozen=True, slots=True)
class KeptWeight:
    """What a step's budget left to one request."""

    num_rows: int
    """Budgeted rows."""
    share: float
    """Of the weight of their routers' own choice, mean over those rows and all layers."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities at P positions, under the model's own distribution: no bias, penalty, temperature or filter."""

    token_ids: list[list[int]]
    """Per position: the token there, then the likeliest ones, best first."""
    values: list[list[float]]
    """Per position: natural logarithms, of the same tokens."""
    ranks: list[int]
    """Per position: place of the token there among all; 1 is the likeliest."""

    def __len__(self) -> int:
        return len(self.ranks)

    def cut(self, start: int, stop: int | None = None) -> Logprobs:
        """Return those of positions ``start`` to ``stop``."""
        return Logprobs(self.token_ids[start:stop], self.values[start:stop], self.ranks[start:stop])

    def extend(self, more: Logprobs) -> None:
        """Append ``more``."""
        self.token_ids.extend(more.token_ids)
        self.values.extend(more.values)
        self.ranks.extend(more.ranks)


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
    ran_s: float
    """Time by the clock that it was computed: since it had been launched, or the step before had ended."""
    logprobs: dict[int, Logprobs] = field(default_factory=dict)
    """By request, for those that ask: of the tokens in ``token_ids``."""
    prompt_logprobs: dict[int, Logprobs] = field(default_factory=dict)
    """By request: of the plan's ``targets``."""
    kept_weights: dict[int, KeptWeight] = field(default_factory=dict)
    """By request, for those with budgeted rows."""
    expert_loads: ExpertLoads | None = None
    """If the plan asks for them."""
    num_graphs: int = 0
    """Shapes of steps that the rank can replay by now; told of steps in which it has no requests."""
    graph_bytes: int = 0
    """Memory of its device that those take; likewise."""


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


class StepRefusedError(StepFailedError):
    """A step was not begun, since ranks are to be brought together first: nothing has failed."""
