"""What a step that is planned while another runs saves, and what it costs to draft nothing for it."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median

from .observation import StepObservation
from .proposal import Proposal

_MATCH_EDGES = (1, 2, 3, 4, 6, 9, 16)
_FREQUENCY_EDGES = (0.35, 0.55, 0.75, 0.9)
_PRIOR = 1.0
"""Plain steps' worth that drafts save in the step after any evidence, before anything is learned: so nothing is given
up unseen."""
_PRIOR_WEIGHT = 4.0
_MEMORY = 100.0
"""Observations a class remembers."""
_NUM_TIMES = 17
"""Steps whose times are remembered. Now and then one followed a moment without requests, or a hiccup: hence medians."""

_Class = tuple[str, int, int]
"""Drafter and classes of match length and of the first token's frequency; all of them nothing without a proposal."""
_ALL: _Class = "", -1, -1
"""What all classes have seen."""


class Overlap:
    """Weighs the next step's drafts against the time in which ranks would wait for it to be planned.

    Drafts for it need the token that is on its way, so it cannot be planned before. What they would be worth is learned
    by the evidence of the position before: a match hardly grows by more than the one token, so where there was none,
    there will be none worth having. It is learned in all steps, whether drafts could be verified or not.
    """

    def __init__(self) -> None:
        self._classes: dict[_Class, tuple[float, float]] = {}
        """Sum and number of what drafts saved after such evidence, fading."""
        self._noted: dict[int, tuple[_Class, float]] = {}
        """Of each request in the step that was decided last: the evidence there, and what its drafts save."""
        self._before: dict[int, _Class] = {}
        """Evidence at the position before, of requests that got one token since."""
        self._waits_s: dict[bool, deque[float]] = {ahead: deque(maxlen=_NUM_TIMES) for ahead in (False, True)}
        """How long ranks had nothing to do between two results, by whether the later step was sent ahead."""

    def note(self, keys: Sequence[int], proposals: Sequence[Proposal], saved: Mapping[int, float]) -> None:
        """Take a decision; ``saved``: plain steps' worth that the drafts of a request save, if any.

        Nothing is learned before a wait was measured: where there are none, nothing is weighed.
        """
        if not any(self._waits_s.values()):
            return
        self._noted = {
            key: (_class_of(proposal), saved.get(key, 0.0)) for key, proposal in zip(keys, proposals, strict=True)
        }

    def observe(self, step: StepObservation) -> None:
        """Learn from the step that was decided last."""
        if step.waited_s is not None:
            self._waits_s[step.was_ahead].append(step.waited_s)
        noted, self._noted = self._noted, {}
        for outcome in step.requests:
            found = noted.get(outcome.key)
            before = self._before.pop(outcome.key, None)
            if found is None:
                continue
            if before is not None:
                for evidence in (_ALL, before):
                    total, weight = self._classes.get(evidence, (0.0, 0.0))
                    kept = min(1.0, _MEMORY / (weight + 1))
                    self._classes[evidence] = total * kept + found[1], weight * kept + 1
            if outcome.num_tokens == 1:
                self._before[outcome.key] = found[0]

    def forget(self, key: int) -> None:
        """The request has ended."""
        self._before.pop(key, None)
        self._noted.pop(key, None)

    def expected(self, keys: Iterable[int]) -> float:
        """Return plain steps' worth that drafts would save in the step after the one that was decided last."""
        return sum(self._mean(self._noted[key][0]) if key in self._noted else _PRIOR for key in keys)

    def gain_s(self, proposals: Iterable[Proposal], plain_s: float) -> float:
        """Return the time that a step without drafts saves by letting the next one be sent while it runs.

        ``proposals``: of those of its requests that may draft. What the next step's drafts would have saved is taken
        off.
        """
        wait_s = self.wait_s
        if not wait_s:
            return 0.0
        forgone = plain_s * sum(self._mean(_class_of(proposal)) for proposal in proposals)
        return max(0.0, wait_s - forgone)

    @property
    def wait_s(self) -> float:
        """How much longer ranks wait for a step that is planned after the one before than for one that was sent ahead.

        0 where none could be, and before a wait was measured.
        """
        after_s, ahead_s = (self._waits_s[ahead] for ahead in (False, True))
        if not after_s:
            return 0.0
        return max(0.0, median(after_s) - (median(ahead_s) if ahead_s else 0.0))

    def as_if_after(self, step: StepObservation) -> StepObservation:
        """Return ``step`` with the time that it would have taken, had it been planned after the one before."""
        return replace(step, step_s=step.step_s + self.wait_s) if step.was_ahead else step

    def _mean(self, evidence: _Class) -> float:
        mean = _PRIOR
        for address in (_ALL, evidence):
            total, weight = self._classes.get(address, (0.0, 0.0))
            mean = (total + mean * _PRIOR_WEIGHT) / (weight + _PRIOR_WEIGHT)
        return mean


def _class_of(proposal: Proposal) -> _Class:
    if not proposal:
        return "", 0, 0
    evidence = proposal.evidence
    frequency = evidence.frequencies[0] if evidence.frequencies else 0.0
    match = bisect_right(_MATCH_EDGES, evidence.match_len)
    return evidence.source, match, bisect_right(_FREQUENCY_EDGES, frequency)
