"""Shadow: draft lengths chosen in every step by expected gain over expected time, for the whole batch at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from .acceptance import AcceptanceModel
from .allocation import Allocation, Chain, StepPrice, allocate
from .baseline import UtilityLedger
from .batch import Batch, RequestView
from .budget_level import BudgetLevel
from .controller import RequestReport
from .observation import ShadowTrial, StepObservation
from .overlap import Overlap
from .proposal import Proposal
from .step_cost import ENOUGH, Level, StepCost

MARGIN = 0.01
"""Expected gain in tokens per second below which nothing is drafted, beside the error of the plain step's time: where
that is larger than the gain, plain steps are run, and measure it better."""
BUDGET_MARGIN = 0.02
"""Expected gain in tokens per second that a budget must bring over none, or over one that comes before it."""
LOSS_SHARE = 0.005
"""Share of all time that drafts may lose in the long run, whatever happens."""
RESERVE_STEPS = 2.0
"""Plain steps' worth that they may lose besides, where much is expected of drafts that the allowance does not pay for:
else it takes long to come back from a loss, in texts that drafts have become right for."""
RESERVE_SHARE = 0.0025
"""Share of all time that the reserve gains, up to where it began."""
LENT_SHARE = 0.1
"""Of the gain that is expected of such drafts: what the reserve lends them in a step."""
LOSS_GRANT_STEPS = 2.0
"""Plain steps' worth of time that they may lose from the start."""
MAX_ALLOWANCE_STEPS = 8.0
"""Plain steps' worth of past gains that may be lost again."""
_LEAST_SHARE = 0.1
"""Of a plain step's time, that drafts beside prompts take at least."""
_REFRESH = 0.3
"""The plain step of a batch is measured again after this many steps over its squared relative error: 32 steps after
four measurements by a clock with 20 % noise, hundreds where time is steady."""


@dataclass(frozen=True, slots=True)
class _Step:
    """What a choice is made of."""

    chains: Sequence[Chain]
    base_rows: Sequence[int]
    """Rows that each rank runs anyway, those of requests with a length of their own included."""
    num_budgeted: int
    """Of these, the ones that keep to a budget if there is one."""

    @property
    def num_rows(self) -> int:
        return sum(self.base_rows)

    @property
    def max_rows(self) -> int:
        return max(self.base_rows)

    @property
    def num_tokens(self) -> float:
        """Expected without drafts of the controller's: requests with a length of their own are all alike to it."""
        return float(len(self.chains))

    @property
    def nothing(self) -> list[int]:
        return [0] * len(self.chains)

    def rows_with(self, draft_lens: Sequence[int]) -> list[int]:
        """Return each rank's rows with these drafts."""
        rows = list(self.base_rows)
        for chain, length in zip(self.chains, draft_lens, strict=True):
            rows[chain.rank] += length
        return rows


class ShadowController:
    """Verifies a drafted token where its expected gain exceeds the rate of the batch times its marginal time.

    Gain: what became of earlier proposals, verified or not (`AcceptanceModel`): learning it costs no verification, so
    nothing is probed. Cost: `StepCost`, fitted to every step that runs anyway; sizes never run are priced by a prior,
    and tried when the loss that the prior foresees is allowed.

    Loss is bounded whatever the estimates are worth: an allowance pays for the time that drafts add to a step and
    receives what their accepted tokens were worth; it gains a small share of all time, and no draft is verified that
    it could not pay for. A reserve lends to it, no more than another small share, where much is expected.

    With ``levels`` of budget, lengths and level are chosen together: under none and each level, the lengths with the
    best rate by the experts and rows sent that are expected there; then, of none and the levels in their order, the
    first whose rate is within `BUDGET_MARGIN` of the best: none where neither experts nor traffic take time.

    Requests with a length of their own keep it and count as rows that run anyway. Beside prompt rows, which read most
    experts anyway, drafts are cheaper; such steps teach no cost.

    A step without drafts can be planned and sent while the one before runs. `rests` says that it should where that
    saves more time than the drafts that such evidence leads to (`Overlap`). Time counts as if all steps were planned
    after the one before, so that the two can be compared.
    """

    wants_trials = True

    def __init__(
        self,
        max_draft_len: int,
        num_experts: int,
        num_experts_per_tok: int,
        num_ranks: int,
        levels: Sequence[BudgetLevel] = (),
    ) -> None:
        self._max_draft_len = max_draft_len
        self._acceptance = AcceptanceModel()
        self._cost = StepCost(num_experts, num_experts_per_tok, num_ranks, levels)
        self._overlap = Overlap()
        self._levels: list[Level] = [None, *range(len(levels))]
        self._level: Level = None
        self._allowance_s = 0.0
        """Time that drafts may still lose."""
        self._plain_step_s: float | None = None
        """Expected time of the planned step without drafts."""
        self._reserve = RESERVE_STEPS
        """Plain steps' worth that the allowance has not been lent yet."""
        self._forgone = 0.0
        """Gain in tokens per second, relative to plain, expected of drafts that the allowance did not pay for."""
        self._saved: dict[int, float] = {}
        """Plain steps' worth that the chosen drafts are expected to save, by place in the batch."""
        self._beside: tuple[float, float] | None = None
        """Of drafts beside prompts: the time they are expected to add, and what a token of theirs is worth."""
        self._unlearned: StepObservation | None = None
        """The step that `learn` has still to learn from."""
        self._ledgers: dict[int, UtilityLedger] = {}
        self._draft_lens: dict[int, int] = {}

    def rests(self, batch: Batch) -> bool:
        """Whether no request may draft, or what drafts are expected to save is less than what waiting for them takes.

        Sizes that are to be measured are waited for.
        """
        if not batch.may_draft:
            return True
        if batch.has_prefill or any(request.is_fixed and request.max_draft_len for request in batch.requests):
            return False
        rows = [0] * batch.num_ranks
        for request in batch.requests:
            rows[request.rank] += 1
        sizes = sum(rows), max(rows)
        if not self._cost.is_known or self._is_unsure(sizes[0]):
            return False
        plain_s = self._cost.step_s(*sizes)
        if self._cost.num_seen(sizes[0] + 1) < ENOUGH:
            longer_s = self._cost.step_s(sizes[0] + 1, sizes[1] + 1)
            if longer_s - plain_s <= self._allowance_s:
                return False
        may_draft = [request.key for request in batch.requests if request.max_draft_len]
        return self._overlap.expected(may_draft) * plain_s < self._overlap.wait_s

    def max_draft_lens(self, batch: Batch) -> list[int]:
        """Return each request's limit: a proposal is worth its comparison with the text even if never verified."""
        return [
            request.max_draft_len if request.is_fixed else min(self._max_draft_len, request.max_draft_len)
            for request in batch.requests
        ]

    def draft_lens(self, batch: Batch, proposals: Sequence[Proposal]) -> list[int]:
        """Return the lengths with the best expected tokens per second; a step without measured time has none."""
        fixed = [len(p) if r.is_fixed else 0 for r, p in zip(batch.requests, proposals, strict=True)]
        self._plain_step_s = self._beside = self._level = None
        self._saved, self._forgone = {}, 0.0
        if not batch.requests or not self._cost.is_known:
            return fixed
        base_rows, num_budgeted = [0] * batch.num_ranks, 0
        for request, proposal, length in zip(batch.requests, proposals, fixed, strict=True):
            base_rows[request.rank] += 1 + length
            num_budgeted += 1 + length if length and request.keeps_to_budget(proposal) else 0
        step = _Step(
            [self._chain(r, p) for r, p in zip(batch.requests, proposals, strict=True)], base_rows, num_budgeted
        )
        if batch.has_prefill:
            chosen = self._choose_beside(step, batch.prompt_rows)
        else:
            chosen = self._choose(step, [p for r, p in zip(batch.requests, proposals, strict=True) if r.max_draft_len])
        keys = [request.key for request in batch.requests]
        if not batch.has_prefill:
            self._overlap.note(keys, proposals, {keys[place]: saved for place, saved in self._saved.items()})
        if batch.is_sent:
            self._beside = self._level = None
            return step.nothing
        return [length + own for length, own in zip(chosen, fixed, strict=True)]

    def budget_level(self) -> int | None:
        """Return the level that was chosen together with the lengths."""
        return self._level

    def observe(self, step: StepObservation) -> None:
        """Settle the allowance and the requests' ledgers; what the step teaches is left to `learn`."""
        self._overlap.observe(step)
        self._unlearned = step = self._overlap.as_if_after(step)
        if step.has_prefill:
            self._account_beside(step)
        if step.has_prefill or not step.requests:
            return
        self._account(step)
        for outcome in step.requests:
            self._draft_lens[outcome.key] = outcome.num_drafted
            ledger = self._ledgers.setdefault(outcome.key, UtilityLedger())
            ledger.add(outcome.num_tokens, step.step_s, self._plain_step_s)

    def learn(self, trials: Sequence[ShadowTrial]) -> None:
        """Learn gain from the trials, and cost from the step's counts and time."""
        for trial in trials:
            self._acceptance.learn(trial)
        step, self._unlearned = self._unlearned, None
        if step is None or not sum(step.rows):
            return
        num_rows, budget = sum(step.rows), (step.budget_level, step.num_budgeted_rows)
        self._cost.learn_experts(num_rows, max(step.experts), *budget)
        if step.requests and not step.has_prefill:
            self._cost.learn(num_rows, max(step.rows), max(step.experts), max(step.rows_sent), step.step_s, *budget)

    def forget(self, key: int) -> None:
        """Drop the request's own estimates; what all requests taught stays."""
        self._acceptance.forget(key)
        self._overlap.forget(key)
        self._ledgers.pop(key, None)
        self._draft_lens.pop(key, None)

    def report(self, key: int) -> RequestReport:
        """Return the length last verified, and the request's utility against the expected plain step."""
        ledger = self._ledgers.get(key)
        return RequestReport(
            phase="shadow",
            draft_len=self._draft_lens.get(key, 0),
            utility=ledger.utility if ledger else None,
            baseline_s=ledger.baseline_s if ledger else None,
        )

    def reach(self, key: int, proposal: Proposal, length: int) -> list[float]:
        """Return what earlier proposals with such evidence came to."""
        return list(accumulate(self._acceptance.probabilities(key, proposal.evidence, length), mul))

    def _chain(self, request: RequestView, proposal: Proposal) -> Chain:
        if request.is_fixed:
            return Chain(request.rank, ())
        draft_len = min(len(proposal), self._max_draft_len, request.max_draft_len)
        return Chain(request.rank, self.reach(request.key, proposal, draft_len), request.keeps_to_budget(proposal))

    def _choose(self, step: _Step, proposals: Sequence[Proposal]) -> list[int]:
        sizes = step.num_rows, step.max_rows
        base = self._base_level(step)
        self._level = base
        self._plain_step_s = self._cost.least_s(*sizes, base, step.num_budgeted)
        plain_s = self._cost.step_s(*sizes, base, step.num_budgeted)
        error = self._cost.relative_error(step.num_rows, base)
        if self._is_unsure(step.num_rows, base):
            return step.nothing
        level, best = self._best(step, [self._cost.price(level) for level in self._priced])
        margin = MARGIN + error
        saved = best.num_tokens / step.num_tokens - best.step_s / plain_s
        # Behind drafts no step can be sent ahead
        gain_s = self._overlap.gain_s(proposals, plain_s)
        if saved * plain_s > gain_s and best.num_tokens * plain_s > (1 + margin) * step.num_tokens * best.step_s:
            self._saved = _shares(step, best, saved - gain_s / plain_s)
            self._level = self._paired(step, best, level)
            return best.draft_lens
        self._forgone = self._gain_forgone(step, plain_s, margin + gain_s / plain_s)
        return self._explore(step, plain_s)

    def _gain_forgone(self, step: _Step, plain_s: float, margin: float) -> float:
        if self._allowance_s > plain_s:
            return 0.0
        price = self._cost.price(None)
        (best,) = allocate(step.chains, step.base_rows, step.num_tokens, [price], math.inf, step.num_budgeted)
        return max(0.0, best.num_tokens * plain_s / (step.num_tokens * best.step_s) - 1 - margin)

    def _is_unsure(self, num_rows: int, base: Level = None) -> bool:
        """Whether the plain step of a batch is to be measured, for the first times or again."""
        error = self._cost.relative_error(num_rows, base)
        is_stale = self._cost.steps_since(num_rows, base) * error**2 > _REFRESH
        return not self._cost.is_measured(num_rows, base) or is_stale

    @property
    def _priced(self) -> Sequence[Level]:
        """None and, where they can matter, the levels."""
        return self._levels if self._cost.budgets_matter else self._levels[:1]

    def _base_level(self, step: _Step) -> Level:
        """Return the level for the requests that draft a length of their own, if no other does."""
        if not step.num_budgeted:
            return None
        prices = [self._cost.price(level) for level in self._priced]
        return self._first_good(
            [Allocation(step.nothing, 1.0, price(step.num_rows, step.max_rows, step.num_budgeted)) for price in prices]
        )

    def _best(self, step: _Step, prices: Sequence[StepPrice]) -> tuple[Level, Allocation]:
        """Return the level, one of `_priced`, and the lengths; ``prices``: of each of them."""
        found = allocate(step.chains, step.base_rows, step.num_tokens, prices, self._allowance_s, step.num_budgeted)
        level = self._first_good(found)
        return level, found[0 if level is None else 1 + level]

    def _first_good(self, found: Sequence[Allocation]) -> Level:
        best = max(allocation.rate for allocation in found)
        good = [allocation.rate * (1 + BUDGET_MARGIN) >= best for allocation in found]
        return self._levels[good.index(True)]

    def _paired(self, step: _Step, best: Allocation, level: Level) -> Level:
        """Return ``level``, or none if a step of this size without a budget shall show what it saves.

        One size measured both ways tells experts that are cheap to read from few that are read.
        """
        if level is None or self._cost.is_paired:
            return level
        rows = step.rows_with(best.draft_lens)
        assert self._plain_step_s is not None
        extra_s = self._cost.step_s(sum(rows), max(rows)) - self._plain_step_s
        return None if self._cost.num_seen(sum(rows), level) and extra_s <= self._allowance_s else level

    def _choose_beside(self, step: _Step, prompt_rows: Sequence[int]) -> list[int]:
        """Return the lengths beside prompts, which are computed whether anything is drafted or not.

        They read most experts already, so drafts beside them are cheaper; what they cost themselves is left out. The
        step's own size need not have been measured: what is asked is only how much longer drafts make it.
        """
        if self._cost.num_measured < ENOUGH:
            return step.nothing
        rows = [base + prompt for base, prompt in zip(step.base_rows, prompt_rows, strict=True)]
        num_prompt, fullest = sum(prompt_rows), max(rows) - step.max_rows
        plain_s = self._cost.step_s(step.num_rows, step.max_rows)
        prompts_s = self._cost.step_s(sum(rows), max(rows)) - plain_s

        def beside(price: StepPrice) -> StepPrice:
            # Sizes are measured apart, so a larger one may seem to take less than the prompts alone
            return lambda num_rows, max_rows, num_budgeted: max(
                price(num_rows + num_prompt, max_rows + fullest, num_budgeted) - prompts_s, _LEAST_SHARE * plain_s
            )

        self._level, best = self._best(step, [beside(self._cost.price(level)) for level in self._priced])
        if best.num_tokens * plain_s <= (1 + MARGIN) * step.num_tokens * best.step_s:
            return step.nothing
        self._beside = best.step_s - plain_s, plain_s / step.num_tokens
        return best.draft_lens

    def _explore(self, step: _Step, plain_s: float) -> list[int]:
        """Return one token of the likeliest chain if its size is unknown and what it may lose is allowed, else none."""
        nothing, chains = step.nothing, step.chains
        likeliest = max(range(len(chains)), key=lambda i: chains[i].gains[0] if chains[i].gains else 0.0)
        chain = chains[likeliest]
        num_rows = step.num_rows + 1
        if not chain.gains or self._cost.num_seen(num_rows, self._level) >= ENOUGH:
            return nothing
        max_rows = max(*step.base_rows, step.base_rows[chain.rank] + 1)
        step_s = self._cost.step_s(num_rows, max_rows, self._level, step.num_budgeted)
        if step_s - plain_s > self._allowance_s:
            return nothing
        nothing[likeliest] = 1
        return nothing

    def _account(self, step: StepObservation) -> None:
        plain_s = self._plain_step_s
        if plain_s is None:
            self._allowance_s = LOSS_GRANT_STEPS * step.step_s
            return
        lent = min(LENT_SHARE * self._forgone, self._reserve)
        self._reserve = min(self._reserve - lent + RESERVE_SHARE, RESERVE_STEPS)
        self._allowance_s += (LOSS_SHARE + lent) * plain_s
        if any(outcome.num_drafted for outcome in step.requests):
            num_tokens = sum(outcome.num_tokens for outcome in step.requests)
            # One hiccup of the machine is no loss of the drafts'
            budget = step.budget_level, step.num_budgeted_rows
            step_s = min(step.step_s, 2 * self._cost.step_s(sum(step.rows), max(step.rows), *budget))
            self._allowance_s += plain_s * num_tokens / len(step.requests) - step_s
        self._allowance_s = min(self._allowance_s, MAX_ALLOWANCE_STEPS * plain_s)

    def _account_beside(self, step: StepObservation) -> None:
        """Settle drafts beside prompts by what they were expected to cost: their share of the step is not measured."""
        if self._beside is None or self._plain_step_s is not None:
            return
        extra_s, token_s = self._beside
        self._beside = None
        self._allowance_s += token_s * sum(outcome.num_accepted for outcome in step.requests) - extra_s
        self._allowance_s = min(self._allowance_s, MAX_ALLOWANCE_STEPS * token_s * len(step.requests))


def _shares(step: _Step, best: Allocation, saved: float) -> dict[int, float]:
    """Return what of ``saved`` is each chain's, by its number: in proportion to the tokens that it is to gain."""
    gains = [sum(chain.gains[:length]) for chain, length in zip(step.chains, best.draft_lens, strict=True)]
    total = sum(gains)
    return {place: saved * gain / total for place, gain in enumerate(gains) if gain}
