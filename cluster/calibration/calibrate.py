"""A whole calibration: one reference, many budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ...router.expert_budget import ExpertBudget
from ...workers.model_info import ModelInfo
from ..config import EngineConfig
from ..engine.ranks import Ranks
from .profile import CalibratedBudget, Conditions, calibrated
from .quality import Question, measure_budget, measure_reference

DRAFT_LEN = 7
_SHARES = (0.75, 0.625, 0.5, 0.375, 0.25)
_COVERAGES = (0.98, 0.95, 0.9)

OnProgress = Callable[[str, int], None]
"""Told what is being measured, and how many more of its answers and texts are done."""


def default_budgets(model: ModelInfo) -> list[ExpertBudget]:
    """Return the grid: shares of the model's experts down to twice what a row uses, then shares of the weight.

    Every request with a list of its own, so that what is found holds whatever else runs.
    """
    least, total = 2 * model.num_experts_per_tok, model.num_experts
    numbers = {round(share * total) for share in _SHARES} | {least}
    rest = "substitution" if model.steerable else "truncation"
    sizes = [
        ExpertBudget(experts=number, scope="request", rest=rest)
        for number in sorted(numbers, reverse=True)
        if least <= number < total
    ]
    return sizes + [ExpertBudget(coverage=share, scope="request", rest=rest) for share in _COVERAGES]


def calibrate(
    config: EngineConfig,
    ranks: Ranks,
    questions: Sequence[Question],
    budgets: Sequence[ExpertBudget],
    decode: Callable[[Sequence[int]], str],
    conditions: Conditions,
    on_progress: OnProgress,
) -> Iterator[CalibratedBudget]:
    """Yield what each of ``budgets`` does to the answers to ``questions``; one that can change nothing is measured too.

    ``conditions``: what is written of the run; its draft length and most tokens are those that are used. Raises
    ``ValueError`` naming ``expert_budget`` for one that the model cannot keep to, before anything is measured.
    """
    model = ranks.infos[0].model
    for budget in budgets:
        budget.check(model.num_experts, model.num_experts_per_tok, steerable=model.steerable)
    draft_len, max_tokens = conditions.draft_len, conditions.max_tokens
    reference = measure_reference(
        config,
        ranks,
        [question.prompt for question in questions],
        draft_len=draft_len,
        max_tokens=max_tokens,
        on_progress=lambda done: on_progress("no budget", done),
    )
    for budget in budgets:
        name = str(budget)
        quality = measure_budget(
            config,
            ranks,
            questions,
            reference,
            budget,
            decode,
            draft_len=draft_len,
            max_tokens=max_tokens,
            on_progress=lambda done, name=name: on_progress(name, done),  # type: ignore[misc]
        )
        yield calibrated(budget, conditions, reference, quality)
