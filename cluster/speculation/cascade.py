"""Cascade: draft lengths by measured utility, as published."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from .baseline import Baseline, UtilityLedger, batch_bucket
from .batch import Batch
from .controller import RequestReport
from .observation import RequestOutcome, ShadowTrial, StepObservation
from .phase_machine import PhaseMachine
from .proposal import Proposal

START_LEN = 3
"""Draft length of a request's first trial."""


class CascadeController:
    """Runs one `PhaseMachine` per request at batch 1, and one shared by all per batch bucket above.

    In a batch every request waits for the same step, so a request has no time of its own to measure: all share one
    length. Steps with prompt rows feed neither baseline nor trial; they draft what won last. Draft lengths do not
    depend on proposals: all that is proposed is verified.

    Source: "Utility-Driven Speculative Decoding for Mixture-of-Experts" (Cascade, arXiv 2506.20675).
    """

    wants_trials = False

    def __init__(self, max_draft_len: int) -> None:
        self._max_draft_len = max_draft_len
        self._baseline = Baseline()
        self._by_request: dict[int, PhaseMachine] = {}
        self._by_batch: dict[int, PhaseMachine] = {}
        self._ledgers: dict[int, UtilityLedger] = {}
        self._batch = Batch(())
        """The step that was planned last."""

    def rests(self, batch: Batch) -> bool:
        """Whether no request may draft, or all wait for a machine to end a disabled phase that has steps to go."""
        if not batch.may_draft:
            return True
        if any(view.is_fixed and view.max_draft_len for view in batch.requests):
            return False
        machine = self._known_machine(batch)
        return machine is not None and machine.rests

    def max_draft_lens(self, batch: Batch) -> list[int]:
        """Return the machine's length, within each request's limit; requests with a length of their own keep it."""
        machine, wanted = self._machine(batch), 0
        if machine is not None:
            wanted = (machine.winner or 0) if batch.has_prefill else machine.draft_len
        return [
            request.max_draft_len if request.is_fixed else min(wanted, request.max_draft_len)
            for request in batch.requests
        ]

    def draft_lens(self, batch: Batch, proposals: Sequence[Proposal]) -> list[int]:
        """Return the lengths of the proposals: all of them are verified."""
        self._batch = batch
        return [len(proposal) for proposal in proposals]

    def budget_level(self) -> int:
        """Return the most lenient level: nothing is learned of budgets."""
        return 0

    def reach(self, key: int, proposal: Proposal, length: int) -> list[float]:
        """Return what the drafter's evidence says: nothing is learned here."""
        return proposal.reach(length)

    def observe(self, step: StepObservation) -> None:
        """Feed baseline and machine; a step with prompt rows feeds neither."""
        if not step.requests or step.has_prefill:
            return
        num_requests, context_len = len(step.requests), max(view.context_len for view in self._batch.requests)
        if not any(outcome.num_drafted for outcome in step.requests):
            self._baseline.add(num_requests, context_len, step.step_s)
        baseline_s = self._baseline.step_s(num_requests, context_len)
        for outcome in step.requests:
            ledger = self._ledgers.setdefault(outcome.key, UtilityLedger())
            ledger.add(outcome.num_tokens, step.step_s, baseline_s)
        machine, learners = self._machine(self._batch), self._learners(step)
        if machine is not None and learners:
            machine.observe(
                fmean(outcome.num_tokens for outcome in learners),
                step.step_s,
                baseline_s,
                drafted=any(outcome.num_drafted for outcome in learners),
            )

    def learn(self, trials: Sequence[ShadowTrial]) -> None:
        """Nothing is left to learn."""

    def forget(self, key: int) -> None:
        """Drop the request's machine and ledger; what batches learned stays."""
        self._by_request.pop(key, None)
        self._ledgers.pop(key, None)

    def report(self, key: int) -> RequestReport:
        """Return the phase and length of the machine that ruled the request's last step, and the request's utility."""
        machine = self._machine(self._batch) if any(view.key == key for view in self._batch.requests) else None
        ledger = self._ledgers.get(key)
        return RequestReport(
            phase=machine.phase if machine else "off",
            draft_len=machine.draft_len if machine else 0,
            utility=ledger.utility if ledger else None,
            baseline_s=ledger.baseline_s if ledger else None,
        )

    def _machine(self, batch: Batch) -> PhaseMachine | None:
        """Return the machine that rules this batch; None where no request leaves its length to the controller."""
        limit = min(
            self._max_draft_len, max((view.max_draft_len for view in batch.requests if not view.is_fixed), default=0)
        )
        if not limit:
            return None
        key, machines = self._place(batch)
        if machines is self._by_batch:
            limit = self._max_draft_len
        if key not in machines:
            machines[key] = PhaseMachine(limit, min(START_LEN, limit))
        return machines[key]

    def _known_machine(self, batch: Batch) -> PhaseMachine | None:
        """Return the machine that would rule this batch, if there is one yet."""
        key, machines = self._place(batch)
        return machines.get(key)

    def _place(self, batch: Batch) -> tuple[int, dict[int, PhaseMachine]]:
        """Return where the machine of a batch is kept."""
        if len(batch.requests) == 1:
            return batch.requests[0].key, self._by_request
        return batch_bucket(len(batch.requests)), self._by_batch

    def _learners(self, step: StepObservation) -> list[RequestOutcome]:
        free = {view.key for view in self._batch.requests if not view.is_fixed and view.max_draft_len}
        return [outcome for outcome in step.requests if outcome.key in free]
