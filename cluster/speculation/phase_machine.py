"""Cascade's test / set machine: find the best draft length by trials, keep it for a while, test again."""

from __future__ import annotations

from statistics import fmean, median

BASELINE, TEST, SET, DISABLED = "baseline", "test", "set", "disabled"

TRIAL_STEPS = 4
_LEAST_STEPS = 2
"""Of a trial that ends early: one may have met a hiccup of the machine."""
MAX_TRIALS = 4
SET_STEPS = 16
MAX_DISABLED_STEPS = 128


class PhaseMachine:
    """The machine of one request (or of all requests that share a batch): one step in, the next draft length out.

    A trial runs ``TRIAL_STEPS`` steps at one length K and measures U(K) = tokens per step / (step time / plain step
    time). A test begins at the last winner; that trial ends early when U can reach 1 no more, were all its other drafts
    right and its steps as quick as the quickest so far. If U < 1 there, one smaller length gets a trial, then
    speculation is disabled; else the length climbs by one while U rises (down, if the first step up does not rise), at
    most ``MAX_TRIALS`` trials. The winner is set for ``SET_STEPS`` steps. Disabled phases double from ``SET_STEPS`` to
    ``MAX_DISABLED_STEPS`` until a length wins again, and are followed by a trial of length 1 only, since a failed
    trial is what speculation costs where it does not pay.

    Source: Cascade (arXiv 2506.20675), whose internals are public in part only: the lengths of phases are ours.
    """

    def __init__(self, max_draft_len: int, start_len: int) -> None:
        assert 1 <= start_len <= max_draft_len
        self._max_draft_len, self._start_len = max_draft_len, start_len
        self.phase = BASELINE
        self.draft_len = 0
        """The length to draft in the next step."""
        self.winner: int | None = None
        """The length that won the last test, 0 if none was worth it; None before the first."""
        self._disabled_steps = SET_STEPS
        self._steps_left = 0
        self._utilities: dict[int, float] = {}
        """Of the present test, per length tried, in order."""
        self._direction = 1
        self._tokens: list[float] = []
        self._times_s: list[float] = []

    @property
    def rests(self) -> bool:
        """Whether the length is 0, and still is after the next step, whatever that shows."""
        return self.phase == DISABLED and self._steps_left > 1

    def observe(self, num_tokens: float, step_s: float, baseline_s: float | None, *, drafted: bool) -> None:
        """Take one step without prompt rows.

        ``num_tokens``: mean per request; ``baseline_s``: None while the plain step is unmeasured, which suspends the
        machine at length 0; ``drafted``: False if the drafter proposed nothing: such a step says nothing of K.
        """
        if baseline_s is None:
            self.phase, self.draft_len = BASELINE, 0
        elif self.phase == BASELINE:
            self._begin_test()
        elif self.phase == TEST:
            if drafted:
                self._try(num_tokens, step_s, baseline_s)
        else:
            self._steps_left -= 1
            if self._steps_left == 0:
                self._begin_test()

    def _begin_test(self) -> None:
        self.phase, self._utilities, self._direction = TEST, {}, 1
        self._begin_trial(self._start_len if self.winner is None else max(self.winner, 1))

    def _begin_trial(self, draft_len: int) -> None:
        self.draft_len, self._tokens, self._times_s = draft_len, [], []

    def _try(self, num_tokens: float, step_s: float, baseline_s: float) -> None:
        self._tokens.append(num_tokens)
        self._times_s.append(step_s)
        # The median, as for the baseline: one step that met a hiccup of the machine must not decide
        utility = fmean(self._tokens) * baseline_s / median(self._times_s)
        if len(self._tokens) < TRIAL_STEPS:
            left = TRIAL_STEPS - len(self._tokens)
            most = (sum(self._tokens) + left * (self.draft_len + 1)) / TRIAL_STEPS * baseline_s / min(self._times_s)
            if self._utilities or len(self._tokens) < _LEAST_STEPS or most >= 1:
                return
            utility = most
        self._utilities[self.draft_len] = utility
        self._decide()

    def _decide(self) -> None:
        first = next(iter(self._utilities))
        best = max(self._utilities, key=lambda length: self._utilities[length])
        if self._utilities[first] >= 1:
            self._climb(first, best)
        elif self._utilities[best] >= 1:
            self._set(best)
        elif len(self._utilities) == 1 and first > 1:
            self._begin_trial(first // 2)
        else:
            self._disable()

    def _climb(self, first: int, best: int) -> None:
        if self.draft_len == best and self._may_try(best + self._direction):
            self._begin_trial(best + self._direction)
        elif self._direction > 0 and best == first and self._may_try(first - 1):
            self._direction = -1
            self._begin_trial(first - 1)
        else:
            self._set(best)

    def _may_try(self, draft_len: int) -> bool:
        return 1 <= draft_len <= self._max_draft_len and len(self._utilities) < MAX_TRIALS

    def _set(self, draft_len: int) -> None:
        self.phase, self.draft_len, self.winner = SET, draft_len, draft_len
        self._steps_left, self._disabled_steps = SET_STEPS, SET_STEPS

    def _disable(self) -> None:
        self.phase, self.draft_len, self.winner = DISABLED, 0, 0
        self._steps_left = self._disabled_steps
        self._disabled_steps = min(2 * self._disabled_steps, MAX_DISABLED_STEPS)
