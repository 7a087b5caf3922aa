"""Running totals of an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ...router.expert_budget import ExpertBudget
from ...workers.plan import StepPlan, StepResult
from .balance import Balance
from .events import EventTotals
from .histogram import Histogram
from .latencies import Latencies
from .layer_totals import LayerTotals
from .output import LENGTH, STOP, EngineStats
from .request import Request
from .scheduler import Scheduler

_DRAFT_LEN = (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32, 64)
_UTILITY = (0.25, 0.5, 0.75, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0)


class Counters:
    """Counts committed work only; a discarded step adds to ``num_failed_steps`` and nothing else."""

    def __init__(self, num_ranks: int, num_moe_layers: int) -> None:
        self._num_moe_layers = num_moe_layers
        self._layers = LayerTotals(num_ranks, num_moe_layers)
        self._budget_names: dict[ExpertBudget, str] = {}
        self.budget_steps: Counter[str] = Counter()
        self.num_steps = 0
        self.num_failed_steps = 0
        self.num_resumed = 0
        """Requests that another engine had begun."""
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_finished: Counter[str] = Counter()
        self.unknown_request_fields: Counter[str] = Counter()
        self.latencies = Latencies()
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self.accepted_per_pos: list[int] = []
        self.draft_len = Histogram(_DRAFT_LEN)
        self.utility = Histogram(_UTILITY)
        self.num_decode_steps = 0
        self.decode_experts = 0
        self.decode_tokens = 0
        self.decode_payload_bytes = 0
        self.rows_sent = 0
        self.payload_bytes = 0
        self.wire_bytes = 0
        self.budgeted_rows = 0
        self.kept_weight = 0.0
        self.step_wall_s = 0.0

    def add_step(self, plan: StepPlan, result: StepResult, num_tokens: int) -> None:
        """Count one committed step that published ``num_tokens``."""
        self.num_steps += 1
        self.step_wall_s += result.wall_s
        counted = self._layers.add(result)
        self.rows_sent += int(counted["rows_sent"])
        self.payload_bytes += int(counted["payload_bytes"])
        self.wire_bytes += int(counted["wire_bytes"])
        self.budgeted_rows += int(counted["budgeted_rows"])
        self.kept_weight += counted["weight_kept"]
        if (budget := plan.ranks[0].budget) is not None:
            if budget not in self._budget_names:
                self._budget_names[budget] = str(budget)
            self.budget_steps[self._budget_names[budget]] += 1
        # A request whose first row already yields a token has nothing but its last token to compute
        if all(request.first_sampled_row == 0 for rank in plan.ranks for request in rank.requests):
            self.num_decode_steps += 1
            self.decode_experts += int(counted["experts"])
            self.decode_payload_bytes += int(counted["payload_bytes"])
            self.decode_tokens += num_tokens

    def add_tokens(self, num_tokens: int, num_drafted: int, num_accepted: int) -> None:
        """Count what one request got from one step."""
        self.num_generation_tokens += num_tokens
        if num_drafted:
            self.num_drafts += 1
            self.num_draft_tokens += num_drafted
            self.num_accepted_tokens += num_accepted
            self.accepted_per_pos += [0] * (num_drafted - len(self.accepted_per_pos))
            for position in range(num_accepted):
                self.accepted_per_pos[position] += 1

    def add_prompt(self, request: Request) -> None:
        """Count the prompt tokens of ``request`` that have been computed since the last time."""
        computed = min(request.committed_len, request.num_prompt_tokens)
        self.num_prompt_tokens += max(0, computed - request.num_prompt_computed)
        request.num_prompt_computed = max(computed, request.num_prompt_computed)

    def finished(self, request: Request, reason: str, now: float, utility: float | None) -> None:
        """Count one request that ended; ``utility``: see `RequestStats.utility`."""
        self.num_finished[reason] += 1
        if utility is not None:
            self.utility.observe(utility)
        if reason in (STOP, LENGTH):
            self.latencies.finished(request, now)

    def snapshot(
        self, scheduler: Scheduler, phases: Mapping[str, int], events: EventTotals, balance: Balance | None = None
    ) -> EngineStats:
        """Return the totals, those of ``events`` among them, beside the present state of the other things."""
        layer_steps = self.num_decode_steps * self._num_moe_layers
        return EngineStats(
            num_steps=self.num_steps,
            num_failed_steps=self.num_failed_steps,
            num_prompt_tokens=self.num_prompt_tokens,
            num_generation_tokens=self.num_generation_tokens,
            num_requests_finished=dict(self.num_finished),
            num_requests_refused=0,  # whoever refuses them counts them
            unknown_request_fields=dict(self.unknown_request_fields),
            num_requests_running=scheduler.num_running,
            num_requests_waiting=len(scheduler.waiting),
            num_preemptions=scheduler.num_preemptions,
            events=events,
            balance=balance,
            num_requests_resumed=self.num_resumed,
            num_kv_blocks=sum(pool.num_blocks for pool in scheduler.pools),
            num_kv_blocks_used=sum(pool.num_used for pool in scheduler.pools),
            spec_decode_num_drafts=self.num_drafts,
            spec_decode_num_draft_tokens=self.num_draft_tokens,
            spec_decode_num_accepted_tokens=self.num_accepted_tokens,
            spec_decode_num_accepted_tokens_per_pos=list(self.accepted_per_pos),
            spec_decode_draft_len=self.draft_len.snapshot(),
            spec_decode_utility=self.utility.snapshot(),
            spec_decode_phases=dict(phases),
            num_decode_steps=self.num_decode_steps,
            decode_experts_per_layer=self.decode_experts / layer_steps if layer_steps else 0.0,
            decode_tokens=self.decode_tokens,
            decode_payload_bytes=self.decode_payload_bytes,
            rows_sent=self.rows_sent,
            payload_bytes=self.payload_bytes,
            wire_bytes=self.wire_bytes,
            budgeted_rows=self.budgeted_rows,
            kept_weight=self.kept_weight,
            budget_steps=dict(self.budget_steps),
            by_rank=self._layers.by_rank(),
            by_layer=self._layers.by_layer(),
            step_wall_s=self.step_wall_s,
            latencies=self.latencies.snapshot(),
        )
