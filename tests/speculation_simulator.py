"""A deterministic machine for controllers: true step times, exact counts and a noisy clock, without a model.

Sampling does not depend on drafts, so a request's text is known beforehand; drafting and verification only decide in
how many steps of which size it comes out. Drafters are real, or scripted by the run of tokens they get right.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from penstock.cluster.speculation.batch import Batch, RequestView
from penstock.cluster.speculation.controller import Controller
from penstock.cluster.speculation.drafter import DraftContext, DrafterFactory
from penstock.cluster.speculation.drafting import Drafting
from penstock.cluster.speculation.observation import RequestOutcome, ShadowTrial, StepObservation
from penstock.cluster.speculation.options import SpeculationOptions
from penstock.cluster.speculation.output_store import OutputStore
from penstock.cluster.speculation.proposal import Evidence, Proposal

NUM_EXPERTS, TOP_K = 32, 4
# Measured on a trained model's code (32 experts, top-4): rows -> distinct experts per layer
MEASURED_EXPERTS = {1: 4.0, 2: 6.6, 3: 8.9, 4: 10.9, 5: 12.4, 6: 13.8, 7: 15.2, 8: 16.1, 16: 21.6, 32: 26.5, 512: 32.0}


def measured_experts(num_rows: int) -> float:
    """Interpolate the measured curve in the logarithm of rows."""
    if num_rows in MEASURED_EXPERTS:
        return MEASURED_EXPERTS[num_rows]
    low = max(n for n in MEASURED_EXPERTS if n < num_rows)
    high = min((n for n in MEASURED_EXPERTS if n > num_rows), default=low)
    if high == low:
        return MEASURED_EXPERTS[low]
    share = math.log(num_rows / low) / math.log(high / low)
    return (1 - share) * MEASURED_EXPERTS[low] + share * MEASURED_EXPERTS[high]


@dataclass(frozen=True)
class Machine:
    """What a step truly costs, and what its clock says. Defaults: the committed prices per step and per expert."""

    num_ranks: int = 1
    fixed_s: float = 2.44e-3
    per_row_s: float = 0.0
    per_expert_s: float = 0.372e-3
    per_row_sent_s: float = 0.0
    row_buckets: Sequence[int] = ()
    """Rows are padded to the next of these for ``per_row_s``, as captured graphs do."""
    table: Callable[[int], float] | None = None
    """Time by rows of all ranks, instead of the prices."""
    drift: Callable[[int], float] = lambda step: 1.0
    """Factor on all times, by step."""
    noise: float = 0.0
    """Standard deviation of the clock's log-normal factor."""
    choice_s: float = 0.0
    """What choosing within a budget of experts adds to a step."""
    outliers: float = 0.0
    """Share of steps whose clock says ten times as much."""
    experts_noise: float = 0.05

    def experts(self, num_rows: int, rng: random.Random) -> list[float]:
        """Count distinct experts on every rank."""
        spread = 1 + self.experts_noise * rng.uniform(-1, 1)
        each = measured_experts(num_rows) * spread / self.num_ranks
        return (
            [min(each * rng.uniform(1.0, 1.1), NUM_EXPERTS / self.num_ranks) for _ in range(self.num_ranks)]
            if (self.num_ranks > 1)
            else [min(each, NUM_EXPERTS)]
        )

    def step_s(
        self,
        rows: Sequence[int],
        experts: Sequence[float],
        rows_sent: Sequence[float],
        step: int,
        *,
        is_budgeted: bool = False,
    ) -> float:
        """True time of a step in lock-step."""
        if self.table is not None:
            return self.table(sum(rows)) * self.drift(step)
        padded = min((b for b in self.row_buckets if b >= max(rows)), default=max(rows))
        time_s = self.fixed_s + self.per_row_s * padded + self.per_expert_s * max(experts)
        time_s += self.per_row_sent_s * max(rows_sent) + self.choice_s * is_budgeted
        return time_s * self.drift(step)

    def clock_s(self, true_s: float, rng: random.Random) -> float:
        """What the clock says of a step."""
        factor = rng.lognormvariate(0, self.noise) if self.noise else 1.0
        return true_s * factor * (10.0 if rng.random() < self.outliers else 1.0)


@dataclass(frozen=True)
class TrueLevel:
    """What a level of budget truly leaves where all rows of a step keep to it."""

    experts: Callable[[int], float] = lambda num_rows: 1.0
    """By rows: the share of the experts that they would read."""
    sent: float = 1.0
    """Of the rows that they would send."""


def at_most(num_experts: int) -> Callable[[int], float]:
    """Return the shares that so many experts leave to rows that share a list."""
    return lambda num_rows: min(1.0, num_experts / measured_experts(num_rows))


@dataclass
class Job:
    """One request: its whole text, and for scripted drafters how many tokens they get right after each position."""

    prompt: list[int]
    output: list[int]
    runs: Callable[[int], int] | None = None
    """By tokens of output so far; None where the drafter has nothing."""
    match_len: int = 3
    options: SpeculationOptions = field(default_factory=SpeculationOptions)


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
    machine: Machine = Machine(),
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


def bernoulli(
    seed: int, num_tokens: int, probability: Callable[[int], float], *, num_prompt: int = 32, none: float = 0.0
) -> Job:
    """A job whose drafts are right token by token with ``probability(tokens of output so far)``.

    ``none``: share of positions at which the drafter has nothing.
    """
    rng = random.Random(seed)
    text = [rng.randrange(1000) for _ in range(num_prompt + num_tokens)]
    hit = [rng.random() < probability(i) for i in range(num_tokens + 64)]
    silent = [rng.random() < none for _ in range(num_tokens + 64)]

    def runs(num_output: int) -> int:
        if silent[num_output]:
            return -1
        run = 0
        while num_output + run < len(hit) and hit[num_output + run]:
            run += 1
        return run

    return Job(text[:num_prompt], text[num_prompt:], runs)


@dataclass(frozen=True)
class Family:
    """Texts of one kind, made to be drafted by n-grams about as well as the demo model's answers of that name."""

    num_prompt: int
    num_tokens: int
    vocabulary: int
    copy: float
    """Share of positions at which a copy of earlier text begins."""
    run: float
    """Mean length of a copy."""

    def job(self, seed: int, num_tokens: int | None = None) -> Job:
        """Make one text."""
        rng = random.Random(seed)
        total = self.num_prompt + (num_tokens or self.num_tokens)
        text: list[int] = []
        while len(text) < total:
            if text and rng.random() < self.copy:
                start = rng.randrange(len(text))
                length = 1 + int(rng.expovariate(1 / self.run))
                for place in range(start, start + length):
                    text.append(text[place])
            else:
                # Few tokens are frequent, so short n-grams match by chance and mislead
                text.append(int(self.vocabulary * rng.random() ** 3))
        return Job(text[: self.num_prompt], text[self.num_prompt : total])


FAMILIES = {
    "code": Family(64, 256, 600, 0.5, 14.0),
    "math": Family(12, 96, 14, 0.02, 3.0),
    "extraction": Family(90, 96, 800, 0.3, 4.0),
    "chat": Family(40, 192, 400, 0.25, 8.0),
}

NOISY = {"noise": 0.2, "outliers": 0.02}


def _measured_table(num_rows: int) -> float:
    """A tuned bf16 kernel over many large experts: rows -> time, measured relative to one row."""
    known = {1: 1.0, 2: 1.5, 3: 1.9, 4: 2.3, 8: 3.2, 16: 4.5, 32: 5.8, 128: 9.0, 512: 20.0}
    low = max(n for n in known if n <= num_rows)
    high = min((n for n in known if n >= num_rows), default=low)
    share = (num_rows - low) / (high - low) if high > low else 0.0
    return 1e-2 * (known[low] + share * (known[high] - known[low]))


MACHINES = {
    "priced": Machine(),
    "memory bound": Machine(fixed_s=0.0, per_expert_s=1e-3),
    "measured table": Machine(table=_measured_table),
    "compute bound": Machine(fixed_s=1e-3, per_row_s=2e-3, per_expert_s=1e-5),
    "free rows": Machine(fixed_s=5e-3, per_expert_s=1e-5),
    "padded graphs": Machine(fixed_s=1e-3, per_row_s=0.3e-3, row_buckets=(1, 2, 4, 8, 16, 32, 64), per_expert_s=0.3e-3),
}


def jobs_of(curve: str, num_jobs: int, num_tokens: int, *, num_prompt: int = 32) -> list[Job]:
    """Make jobs whose drafts are right by a curve: a constant, drifting, flipping, silent or bimodal over requests."""
    curves: dict[str, Callable[[int, int], float]] = {
        "never": lambda job, i: 0.0,
        "seldom": lambda job, i: 0.2,
        "sometimes": lambda job, i: 0.4,
        "often": lambda job, i: 0.6,
        "mostly": lambda job, i: 0.8,
        "nearly always": lambda job, i: 0.95,
        "drifting": lambda job, i: 0.5 + 0.45 * math.sin(i / 25),
        "flipping fast": lambda job, i: 0.9 * (i // 16 % 2),
        "flipping": lambda job, i: 0.9 * (i // 48 % 2),
        "silent half the time": lambda job, i: 0.3,
        "bimodal": lambda job, i: 0.9 * (job % 2),
    }
    probability = curves[curve]
    none = 0.5 if curve == "silent half the time" else 0.0
    return [
        bernoulli(1000 + job, num_tokens, lambda i, job=job: probability(job, i), num_prompt=num_prompt, none=none)
        for job in range(num_jobs)
    ]
