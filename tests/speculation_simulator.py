"""A deterministic simulation for controllers, without a model: requests, a machine and what becomes of them.

Sampling does not depend on drafts, so a request's text is known beforehand; drafting and verification only decide in
how many steps of which size it comes out. Drafters are real, or scripted by the run of tokens they get right.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from penstock.cluster.speculation.batch import Batch, RequestView
from penstock.cluster.speculation.controller import Controller
from penstock.cluster.speculation.drafter import DraftContext, DrafterFactory
from penstock.cluster.speculation.drafting import Drafting
from penstock.cluster.speculation.observation import RequestOutcome, ShadowTrial, StepObservation
from penstock.cluster.speculation.output_store import OutputStore
from penstock.cluster.speculation.proposal import Evidence, Proposal

from .simulated_jobs import Job
from .simulated_machine import PRICED, TOP_K, Machine, TrueLevel


@dataclass(frozen=True)
class _ScriptedContext(DraftContext):
    job: Job | None = None


class ScriptedDrafter:
    """Gets as many tokens right as the job says, and the next wrong."""

    def __init__(self, job: Job) -> None:
        self._job, self._text, self._num_seen = job, job.prompt + job.output, 0

    def extend(self, token_ids: Sequence[int]) -> None:
        self._num_seen += len(token_ids)

    def propose(self, max_draft_len: int) -> Proposal:
        assert self._job.runs is not None
        run = self._job.runs(self._num_seen - len(self._job.prompt))
        if run < 0:
            return Proposal()
        right = self._text[self._num_seen : self._num_seen + min(run, max_draft_len)]
        tokens = right + [-1] * (max_draft_len - len(right))
        return Proposal(tokens, Evidence("scripted", self._job.match_len))


def scripted(context: DraftContext, store: OutputStore) -> ScriptedDrafter:
    """Make the drafter that a job scripts."""
    assert isinstance(context, _ScriptedContext)
    assert context.job is not None
    return ScriptedDrafter(context.job)


@dataclass
class _Live:
    key: int
    job: Job
    rank: int
    text: list[int]
    num_prefilled: int

    @property
    def num_left(self) -> int:
        return len(self.job.prompt) + len(self.job.output) - len(self.text)


@dataclass
class Run:
    """What a simulation came to."""

    num_tokens: int = 0
    time_s: float = 0.0
    """True time of all steps."""
    num_steps: int = 0
    full_tokens: int = 0
    full_time_s: float = 0.0
    """Of the steps in which the batch was full: what is left of it at the end compares with nothing."""
    draft_lens: dict[int, list[int]] = field(default_factory=dict)
    """Per request, tokens verified in each of its decoding steps."""
    times_s: dict[int, list[float]] = field(default_factory=dict)
    """Per request, true times of those steps."""
    clock_s: dict[int, list[float]] = field(default_factory=dict)
    """Per request, what the clock said of them."""
    phases: dict[int, list[str]] = field(default_factory=dict)
    """Per request, the controller's phase after each."""
    levels: list[int | None] = field(default_factory=list)
    """Of the steps that verified drafts which may keep to a budget: the one they kept to."""
    trials: list[ShadowTrial] = field(default_factory=list)
    """Of the last step: the engine lets a controller learn from them when the next one is planned."""

    def let_learn(self, controller: Controller) -> None:
        """Have the controller learn from the last step."""
        trials, self.trials = self.trials, []
        controller.learn(trials)

    @property
    def rate(self) -> float:
        """Tokens per second while the batch was full."""
        return self.full_tokens / self.full_time_s


def simulate(
    controller: Controller,
    jobs: Sequence[Job],
    machine: Machine = PRICED,
    *,
    batch_size: int = 1,
    make_drafter: DrafterFactory = scripted,
    max_draft_len: int = 7,
    prefill_chunk: int = 0,
    store_tokens: int = 1 << 16,
    levels: Sequence[TrueLevel] = (),
    seed: int = 0,
) -> Run:
    """Serve ``jobs`` in order, ``batch_size`` at once; each job's first token comes with its prompt.

    ``prefill_chunk``: prompt rows a step, taken beside the decoding requests; 0: prompts cost no step at all.
    """
    rng, run = random.Random(seed), Run()
    drafting = Drafting(make_drafter, store_tokens, keep_trials=controller.wants_trials)
    waiting = list(enumerate(jobs))[::-1]
    live: list[_Live] = []
    while waiting or live:
        while waiting and len(live) < batch_size:
            live.append(_admit(*waiting.pop(), live, machine.num_ranks, drafting))
        tokens, time_s = run.num_tokens, run.time_s
        _step(controller, drafting, live, machine, rng, run, max_draft_len, prefill_chunk, levels)
        if len(live) == batch_size:
            run.full_tokens += run.num_tokens - tokens
            run.full_time_s += run.time_s - time_s
        for request in [r for r in live if not r.num_left]:
            live.remove(request)
            run.let_learn(controller)
            drafting.close(request.key, request.text)
            controller.forget(request.key)
    return run


def _admit(key: int, job: Job, live: Sequence[_Live], num_ranks: int, drafting: Drafting) -> _Live:
    rank = min(range(num_ranks), key=lambda r: (sum(other.rank == r for other in live), r))
    drafting.open(key, _ScriptedContext(len(job.prompt), job=job))
    return _Live(key, job, rank, list(job.prompt), 0)


def _step(
    controller: Controller,
    drafting: Drafting,
    live: Sequence[_Live],
    machine: Machine,
    rng: random.Random,
    run: Run,
    max_draft_len: int,
    prefill_chunk: int,
    levels: Sequence[TrueLevel],
) -> None:
    rows = [0] * machine.num_ranks
    prompt_rows = [0] * machine.num_ranks
    for request in live:
        left = len(request.job.prompt) - request.num_prefilled
        if left and prefill_chunk:
            chunk = min(left, prefill_chunk)
            request.num_prefilled += chunk
            rows[request.rank] += chunk
            prompt_rows[request.rank] += chunk
        elif left:
            request.num_prefilled = len(request.job.prompt)
        if left and request.num_prefilled == len(request.job.prompt):
            request.text.append(request.job.output[0])
            run.num_tokens += 1
    # Those whose prompt ends in this step yield their first token by it, and decode from the next
    decoding = [
        r for r in live if len(r.text) > len(r.job.prompt) and r.num_left and not (any(prompt_rows) and _is_fresh(r))
    ]
    views = [
        RequestView(
            r.key,
            r.rank,
            len(r.text),
            r.job.options.limit(max_draft_len, r.num_left),
            r.job.options.is_fixed,
            r.job.options.allows_budget,
        )
        for r in decoding
    ]
    batch = Batch(views, machine.num_ranks, prompt_rows)
    limits = controller.max_draft_lens(batch)
    proposals = [
        drafting.propose(r.key, r.text, limit) if limit else Proposal()
        for r, limit in zip(decoding, limits, strict=True)
    ]
    lengths = controller.draft_lens(batch, proposals)
    outcomes, trials = [], []
    for r, view, proposal, length in zip(decoding, views, proposals, lengths, strict=True):
        assert 0 <= length <= min(len(proposal), view.max_draft_len)
        rows[r.rank] += 1 + length
        accepted = _num_right(r, proposal, length)
        start = len(r.job.prompt)
        begin = len(r.text) - start
        r.text += r.job.output[begin : begin + accepted + 1]
        outcomes.append(RequestOutcome(r.key, length, accepted, accepted + 1))
        run.num_tokens += accepted + 1
        trials += drafting.settle(r.key, r.text) if controller.wants_trials else []
    if not any(rows):
        return
    decided = zip(views, proposals, lengths, strict=True)
    budgeted = sum(1 + length for view, proposal, length in decided if length and view.keeps_to_budget(proposal))
    level = controller.budget_level() if levels and budgeted else None
    if levels and budgeted:
        run.levels.append(level)
    share, left = budgeted / sum(rows), TrueLevel() if level is None else levels[level]
    experts = [n * (1 - share * (1 - left.experts(sum(rows)))) for n in machine.experts(sum(rows), rng)]
    sent = [own * TOP_K * (machine.num_ranks - 1) / machine.num_ranks * rng.uniform(0.9, 1.0) for own in rows]
    sent = [n * (1 - share * (1 - left.sent)) for n in sent]
    true_s = machine.step_s(rows, experts, sent, run.num_steps, is_budgeted=level is not None)
    clock_s = machine.clock_s(true_s, rng)
    run.num_steps += 1
    run.time_s += true_s
    run.let_learn(controller)
    counts = StepObservation(clock_s, outcomes, rows, any(prompt_rows), experts, sent)
    controller.observe(replace(counts, budget_level=level, num_budgeted_rows=budgeted if level is not None else 0))
    run.trials = trials
    for outcome in outcomes:
        run.draft_lens.setdefault(outcome.key, []).append(outcome.num_drafted)
        run.times_s.setdefault(outcome.key, []).append(true_s)
        run.clock_s.setdefault(outcome.key, []).append(clock_s)
        run.phases.setdefault(outcome.key, []).append(controller.report(outcome.key).phase)


def _is_fresh(request: _Live) -> bool:
    return len(request.text) == len(request.job.prompt) + 1


def _num_right(request: _Live, proposal: Proposal, length: int) -> int:
    begin = len(request.text) - len(request.job.prompt)
    right = 0
    while right < length and proposal.token_ids[right] == request.job.output[begin + right]:
        right += 1
    return right
