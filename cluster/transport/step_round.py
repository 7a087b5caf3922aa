"""The steps that ranks have been given, and what has been heard of each: an answer may come before it is asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...workers.plan import RankError, RankResult, StepFailedError, StepPlan
from .messages import Done, Failed


@dataclass(slots=True)
class StepRound:
    """One step."""

    generation: int
    step_id: int
    started_s: float
    """When ranks could begin with it, by ``time.perf_counter``."""
    refusal: str | None = None
    """Why it was not sent."""
    answers: dict[int, RankResult | RankError] = field(default_factory=dict)
    """By rank."""


class StepRounds:
    """Steps in the order in which they were sent. Each rank runs them in that order too, one after the other."""

    def __init__(self) -> None:
        self._rounds: list[StepRound] = []

    def begin(self, plan: StepPlan, refusal: str | None = None) -> None:
        """Take note of a step that is sent, or why it is not."""
        self._rounds.append(StepRound(plan.generation, plan.step_id, time.perf_counter(), refusal))

    def first(self, plan: StepPlan) -> StepRound:
        """Return the round of the oldest step, which is ``plan``."""
        first = self._rounds[0]
        assert (first.generation, first.step_id) == (plan.generation, plan.step_id), "steps are collected in order"
        return first

    def hear(self, rank: int, answer: Done | Failed) -> None:
        """Take a rank's answer; one to a step that was given up says nothing."""
        said = answer.result if isinstance(answer, Done) else answer.error
        for entry in self._rounds:
            if (entry.generation, entry.step_id) == (said.generation, said.step_id):
                entry.answers[rank] = said

    def end(self) -> float:
        """Forget the oldest step; return how long it took since ranks could begin, which the next can do from now."""
        now_s, first = time.perf_counter(), self._rounds.pop(0)
        for entry in self._rounds:
            entry.started_s = now_s
        return now_s - first.started_s

    def clear(self) -> None:
        """Give all steps up."""
        self._rounds.clear()


def results_of(
    answers: Mapping[int, RankResult | RankError], ranks: Sequence[int], lost: Mapping[int, str]
) -> list[RankResult]:
    """Return what ``ranks`` answered; raise ``StepFailedError`` unless all have run the step.

    ``lost``: how those were lost that were.
    """
    results = [said for _, said in sorted(answers.items()) if isinstance(said, RankResult)]
    if len(results) < len(ranks):
        errors = {rank: said.message for rank, said in answers.items() if isinstance(said, RankError)}
        errors |= {rank: f"lost ({how})" for rank, how in lost.items()}
        raise StepFailedError("; ".join(f"rank {rank}: {errors[rank]}" for rank in sorted(errors)))
    return results
