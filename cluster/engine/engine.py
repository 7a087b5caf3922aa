"""The engine loop: draft, schedule, step, commit. Free of Ray, sockets and threads."""

from __future__ import annotations

import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from ...workers.model_info import ModelInfo
from ...workers.plan import Logprobs, RankPlan, RankResult, RequestPlan
from ...workers.sampling_params import SamplingParams
from ..config import EngineConfig
from ..speculation.controller import PHASES, Controller, RequestReport
from ..speculation.drafter import DraftContext, drafter_factory
from ..speculation.drafting import Drafting
from ..speculation.observation import RequestOutcome, StepObservation
from ..speculation.options import AUTO, MAX_DRAFT_LEN, SpeculationOptions
from ..speculation.policy import make_controller
from .block_pool import BlockPool
from .budget import EngineBudget, make_budgets
from .events import EventLog
from .output import ABORT, ERROR, LENGTH, STOP, TIMEOUT, EngineStats, RequestOutput, RequestStats
from .prompt_check import check_prompt
from .proposer import Proposer
from .ranks import MovableRanks, Ranks
from .rebalancer import Rebalancer
from .request import Request
from .scheduler import Scheduler
from .stats import Counters
from .stepper import RanStep, Stepper
from .warm_up import padding_of, warm_up, warm_ups

_PHASES_S = 1.0
"""Requests are counted by phase at most this often: it asks the controller about each."""


class Engine:
    """Serves requests over ``ranks``. One thread calls it; between calls its state is always committed, even if
    ranks run a step that was sent ahead.

    ``controller`` replaces the one that ``config.policy`` names, and may then draft up to 64 tokens. ``budgets``: what
    is known of ``config.budgets``, for a controller that weighs them. ``events``: where faults and recoveries are
    recorded, if not in a log of its own.

    A request's tokens are published only when every rank has answered the step; a failed step leaves no trace but a
    count, and is planned again from what is committed.
    """

    def __init__(
        self,
        config: EngineConfig,
        ranks: Ranks,
        *,
        controller: Controller | None = None,
        budgets: Sequence[EngineBudget] = (),
        events: EventLog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        make_drafter = drafter_factory(config.drafter)  # refuse an unknown name now
        self.config, self.ranks = config, ranks
        self.model: ModelInfo = ranks.infos[0].model
        known = make_budgets(config, self.model, budgets)
        self.controller = controller or make_controller(
            config.policy,
            draft_len=config.fixed_draft_len,
            max_draft_len=config.max_draft_len,
            num_experts=self.model.num_experts,
            num_experts_per_tok=self.model.num_experts_per_tok,
            num_ranks=len(ranks.infos),
            levels=[entry.level for entry in known],
        )
        own = {"off": 0, "fixed": config.fixed_draft_len}.get(config.policy, config.max_draft_len)
        self._max_draft_len = MAX_DRAFT_LEN if controller is not None else own
        self._drafting = Drafting(
            make_drafter,
            config.suffix_store_tokens if config.drafter == "suffix" else 0,
            keep_trials=self.controller.wants_trials,
        )
        self.counters = Counters(len(ranks.infos), self.model.num_moe_layers)
        self.clock = clock
        self.events = EventLog() if events is None else events
        pools = [BlockPool(info.num_kv_blocks, config.block_size) for info in ranks.infos]
        self._padding = padding_of(config, ranks.infos, self._max_draft_len)
        self.scheduler = Scheduler(pools, config.max_num_seqs, config.max_num_batched_tokens, self._padding)
        self._budgets = [entry.budget for entry in known]
        self._proposer = Proposer(self.controller, self._drafting, self.scheduler, self._budgets, self._max_draft_len)
        self._rebalancer: Rebalancer | None = None
        if config.enable_eplb:
            assert isinstance(ranks, MovableRanks), "ranks in processes of their own can hand experts to each other"
            self._rebalancer = Rebalancer(config, ranks, self.events, clock=clock)
        self._requests: dict[str, Request] = {}
        self._by_key: dict[int, Request] = {}
        self._next_key = 0
        self._stepper = Stepper(
            config,
            ranks,
            self.scheduler,
            self._proposer,
            self._rebalancer,
            self._by_key,
            self.counters,
            self.events,
            clock,
        )
        self._unlearned: list[int] = []
        """Requests (`Request.key`) that decoded in the last step, until `learn` has been called."""
        self._phases: Counter[str] = Counter()
        self._phases_due_s = 0.0
        self._earliest_s = math.inf
        """No live request came before this."""
        self._is_given_up = False

    def warm_up(self) -> None:
        """Have ranks that replay graphs capture those that requests will need; nothing where they do not.

        Before the first request, by whoever says that the engine is ready. Raises ``EngineDeadError`` after
        ``max_step_retries`` failures in a row.
        """
        if self._padding is not None:
            warm_up(self._stepper, warm_ups(self._padding.first(), self._budgets))

    @property
    def has_requests(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._requests) or (self._stepper.is_under_way and not self._is_given_up)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        speculation: SpeculationOptions = AUTO,
        *,
        client: str = "",
        arrival_s: float | None = None,
        output_token_ids: Sequence[int] = (),
    ) -> SamplingParams:
        """Queue a request and return its sampling with the seed that was drawn if it had none.

        ``client``: whose it is, for fair admission. ``arrival_s``: when it came, by the engine's clock, if not now.
        ``output_token_ids``: what another engine has generated of it; its outputs begin after these.
        Raises ``ValueError`` naming the field; then nothing has changed.
        """
        if request_id in self._requests:
            raise ValueError(f"request_id: {request_id!r} is in use")
        speculation.check_prediction(self.model.vocab_size, self.model.max_model_len)
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(63))
        request = Request(
            request_id=request_id,
            key=self._next_key,
            sampling=sampling,
            speculation=speculation,
            token_sampling=sampling.token_sampling(len(prompt_token_ids), self.model.eos_token_ids),
            token_ids=[*prompt_token_ids, *output_token_ids],
            num_prompt_tokens=len(prompt_token_ids),
            max_total_tokens=check_prompt(self.model, prompt_token_ids, sampling),
            arrival_s=self.clock() if arrival_s is None else arrival_s,
            client=client,
        )
        if output_token_ids:
            request.first_token_s = request.last_token_s = self.clock()
            self.counters.num_resumed += 1
        self._next_key += 1
        self._earliest_s = min(self._earliest_s, request.arrival_s)
        self._requests[request_id] = self._by_key[request.key] = request
        self._drafting.open(
            request.key,
            DraftContext(
                num_prompt_tokens=request.num_prompt_tokens,
                prediction=speculation.prediction_token_ids,
                prompt_lookup_max=self.config.prompt_lookup_max,
                prompt_lookup_min=self.config.prompt_lookup_min,
            ),
        )
        self.scheduler.add(request)
        return sampling

    def abort(self, request_id: str, reason: str = ABORT) -> RequestStats | None:
        """Drop a request, free its blocks and return its counts; unknown or finished ones are ignored.

        ``reason``: what it counts as, ``STOP`` when the reader found its stop string.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        return self._finish(request, reason, self.clock())

    def step(self) -> list[RequestOutput]:
        """Run one step and return what it adds to each request; the next one may be under way when it returns.

        Raises ``EngineDeadError`` after ``max_step_retries`` failures in a row.
        """
        step = self._stepper.step()
        if step is None:
            return self._expire()
        self.learn()
        return self._commit(step) + self._expire()

    def learn(self) -> None:
        """Learn what drafts and time of the last step teach.

        `step` does so by itself, once the ranks are done. Whoever has it done while they run the next step, and in the
        same thread, saves that time: no decision is the wiser for an earlier call.
        """
        keys, self._unlearned = self._unlearned, []
        self.controller.learn(
            [
                trial
                for key in (keys if self.controller.wants_trials else ())
                for trial in self._drafting.settle(key, self._by_key[key].token_ids)
            ]
        )

    def _expire(self) -> list[RequestOutput]:
        """End the requests that have taken too long."""
        limit, now = self.config.request_timeout_s, self.clock()
        if limit is None or now - self._earliest_s <= limit:
            return []
        # Not in order of arrival: one that another engine had begun came before those that this one has had longer
        expired = [request for request in self._requests.values() if now - request.arrival_s > limit]
        live = (request.arrival_s for request in self._requests.values() if now - request.arrival_s <= limit)
        self._earliest_s = min(live, default=math.inf)
        return self._end(expired, TIMEOUT, f"the request took longer than request_timeout_s = {limit:g} s")

    def fail_all(self, message: str) -> list[RequestOutput]:
        """End every request with an error, and leave alone what ranks run; for a caller that gives the engine up."""
        self._is_given_up = True
        return self._end(list(self._requests.values()), ERROR, message)

    def _end(self, requests: Sequence[Request], reason: str, message: str) -> list[RequestOutput]:
        outputs = [
            RequestOutput(request.request_id, request.num_output_tokens, [], finish_reason=reason, error=message)
            for request in requests
        ]
        now = self.clock()
        for request in requests:
            self._finish(request, reason, now)
        return outputs

    def stats(self) -> EngineStats:
        """Return totals and present state."""
        now = self.clock()
        if now >= self._phases_due_s or not self._requests:
            self._phases = Counter(dict.fromkeys(PHASES, 0))
            self._phases.update(self._report(request).phase for request in self._proposer.decoding())
            self._phases_due_s = now + _PHASES_S
        balance = None if self._rebalancer is None else self._rebalancer.balance()
        return self.counters.snapshot(self.scheduler, self._phases, self.events.totals(), balance)

    def _report(self, request: Request) -> RequestReport:
        """Return what is known of a live request's speculation, its own wish first."""
        report = self.controller.report(request.key)
        limit = request.speculation.limit(self._max_draft_len, self._max_draft_len + 1)
        if limit and not request.speculation.is_fixed:
            return report
        return replace(report, phase="fixed" if limit else "off", draft_len=limit)

    def recover(self) -> None:
        """Bring the ranks back together between steps; for a caller that knows that one is lost."""
        self._stepper.recover()

    def _commit(self, step: RanStep) -> list[RequestOutput]:
        plan, result, now = step.plan, step.result, self.clock()
        outputs, outcomes = [], []
        for rank_plan, rank_result in zip(plan.ranks, result.ranks, strict=True):
            for part, tokens in self._parts(rank_plan, rank_result):
                request = self._by_key.get(part.request_id)
                if request is None:  # it ended while this step was under way
                    continue
                if (kept_weight := rank_result.kept_weights.get(request.key)) is not None:
                    request.take_kept_weight(kept_weight)
                if (scored := rank_result.prompt_logprobs.get(request.key)) is not None:
                    request.take_prompt_logprobs(scored)
                output = self._commit_request(request, part, tokens, rank_result.logprobs.get(request.key), now)
                if output is None:
                    continue
                if kept_weight is not None:
                    output = replace(output, num_budgeted_rows=kept_weight.num_rows)
                outputs.append(output)
                if part.first_sampled_row == 0 and output.offset > 0:  # it was decoding when this step was planned
                    num_kept = len(output.token_ids)
                    accepted = min(len(tokens) - 1, num_kept)
                    outcomes.append(RequestOutcome(request.key, part.num_sampled_rows - 1, accepted, num_kept))
                    self.counters.draft_len.observe(part.num_sampled_rows - 1)
        self.counters.add_step(plan, result, sum(len(output.token_ids) for output in outputs))
        self.controller.observe(self._observation(step, outcomes, now - step.started_s))
        self._unlearned = [outcome.key for outcome in outcomes]
        # Only now does the controller know of the requests' last steps
        return [self._ended(output, now) if output.finish_reason is not None else output for output in outputs]

    def _ended(self, output: RequestOutput, now: float) -> RequestOutput:
        assert output.finish_reason is not None
        return replace(output, stats=self._finish(self._requests[output.request_id], output.finish_reason, now))

    def _observation(self, step: RanStep, outcomes: list[RequestOutcome], step_s: float) -> StepObservation:
        plan, result = step.plan, step.result
        num_layers = max(self.model.num_moe_layers, 1)
        return StepObservation(
            step_s=step_s,
            requests=outcomes,
            rows=[sum(len(part.token_ids) for part in rank.requests) for rank in plan.ranks],
            has_prefill=len(outcomes) < sum(len(rank.requests) for rank in plan.ranks),
            experts=[sum(rank.counts.experts) / num_layers for rank in result.ranks],
            rows_sent=[sum(rank.counts.rows_sent) / num_layers for rank in result.ranks],
            budget_level=self._proposer.level_of(plan.ranks[0].budget),
            num_budgeted_rows=sum(
                part.num_sampled_rows
                for rank in plan.ranks
                for part in rank.requests
                if part.first_budgeted_row is not None
            ),
            waited_s=step.waited_s,
            was_ahead=step.was_ahead,
        )

    @staticmethod
    def _parts(plan: RankPlan, result: RankResult) -> list[tuple[RequestPlan, list[int]]]:
        return list(zip(plan.requests, result.token_ids, strict=True))

    def _commit_request(
        self, request: Request, part: RequestPlan, tokens: list[int], logprobs: Logprobs | None, now: float
    ) -> RequestOutput | None:
        request.committed_len += part.first_sampled_row + len(tokens)
        self.counters.add_prompt(request)
        if not tokens:
            return self._end_of_prompt(request) if request.is_complete else None
        num_drafted = len(part.token_ids) - part.first_sampled_row - 1
        offset = request.num_output_tokens
        kept, reason, stop_token = self._truncate(request, tokens)
        num_accepted = min(len(tokens) - 1, len(kept))
        request.token_ids += kept
        prediction_drafts = request.take_step(offset, num_drafted, num_accepted)
        self.counters.latencies.tokens(request, now)
        if request.first_token_s is None:
            request.first_token_s = now
        request.last_token_s = now
        self.counters.add_tokens(len(kept), num_drafted, num_accepted)
        self.scheduler.waiting.charge(request.client, num_output_tokens=len(kept))
        return RequestOutput(
            request.request_id,
            offset,
            kept,
            reason,
            stop_token,
            logprobs=logprobs.cut(0, len(kept)) if logprobs is not None else None,
            prompt_logprobs=request.prompt_logprobs if offset == 0 else None,
            prediction_drafts=prediction_drafts,
        )

    @staticmethod
    def _end_of_prompt(request: Request) -> RequestOutput:
        """Return the only output of a request that wants no tokens but its prompt's log-probabilities."""
        logprobs = request.prompt_logprobs or Logprobs([], [], [])  # a prompt of one token has none
        return RequestOutput(request.request_id, 0, [], LENGTH, prompt_logprobs=logprobs)

    def _truncate(self, request: Request, tokens: list[int]) -> tuple[list[int], str | None, int | None]:
        """Cut ``tokens`` after the first that ends the request: (kept, finish reason, stop token)."""
        assert len(tokens) <= request.num_tokens_left, "drafts are planned within what is left"
        sampling = request.sampling
        for index, token in enumerate(tokens):
            if token in sampling.stop_token_ids or (not sampling.ignore_eos and token in self.model.eos_token_ids):
                return tokens[: index + 1], STOP, token
        return tokens, LENGTH if len(tokens) == request.num_tokens_left else None, None

    def _finish(self, request: Request, reason: str, now: float) -> RequestStats:
        if request.key in self._unlearned:  # its last drafts teach as well
            self.learn()
        stats = request.stats(now, self._report(request))
        self.scheduler.remove(request)
        self.counters.finished(request, reason, now, stats.utility)
        self._drafting.close(request.key, request.token_ids)
        self.controller.forget(request.key)
        del self._requests[request.request_id], self._by_key[request.key]
        return stats
