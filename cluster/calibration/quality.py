"""What a budget of experts does to a model's answers: the measurements behind `penstock calibrate`.

The model without a budget answers first, greedily; that is the reference. Under a budget it answers again, with real
drafts (paired exact match where the right answers are known), and is led along the reference's answers step by step
(next-token agreement and perplexity).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...router.expert_budget import ExpertBudget
from ...workers.sampling_params import SamplingParams
from ..config import EngineConfig
from ..engine.engine import Engine
from ..engine.ranks import Ranks
from .paired import PairedMatches, paired_matches
from .teacher_forcing import OnProgress, Text, TextScores, ignore_progress, score_texts

NUM_COUNTED = 32
"""Texts whose verifications are computed once more, one by one, to count their experts."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and, where it is known, the only right answer to it."""

    prompt: tuple[int, ...]
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Answers:
    """Greedy answers to questions."""

    token_ids: list[list[int]]
    """Per question; the token that ended it included."""
    tokens_per_step: float
    """Mean tokens that a step yields to one request."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The model without a budget."""

    answers: Answers
    texts: list[Text]
    """The questions, followed by its answers."""
    scores: TextScores
    experts_per_layer: float
    """Distinct experts that a verification alone in its step computes per MoE layer, all ranks together."""


@dataclass(frozen=True, slots=True)
class BudgetQuality:
    """The model under a budget, beside the reference."""

    matches: PairedMatches | None
    """Of the questions whose answer is known; None where there is none."""
    num_tokens: int
    """Of the reference's answers that the next two are of: all but the first of each."""
    agreement: float
    """Share of them where the likeliest token is the reference's."""
    perplexity_ratio: float
    """Of the perplexity of the reference's answers to the reference's own."""
    experts_per_layer: float
    """Distinct experts that a verification alone in its step computes per MoE layer, all ranks together."""
    kept_weight: float | None
    """Mean share of their routers' weight that rows which kept to the budget could use; None if none did."""
    tokens_per_step: float


def with_drafts(config: EngineConfig, draft_len: int, budget: ExpertBudget | None) -> EngineConfig:
    """Return ``config`` with drafts of a fixed length and this budget; a length of 0 drafts nothing."""
    return replace(
        config,
        speculation="fixed",
        draft_len=draft_len,
        expert_budget=None if budget is None else str(budget),
    )


def greedy_answers(
    config: EngineConfig,
    ranks: Ranks,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    on_progress: OnProgress = ignore_progress,
) -> Answers:
    """Answer ``prompts`` as ``config`` drafts and budgets, ``config.max_num_seqs`` at a time on each rank.

    ``max_tokens``: of each answer at most, and what the context has room for.
    """
    engine = Engine(config, ranks)
    for index, prompt in enumerate(prompts):
        most = min(max_tokens, engine.model.max_model_len - len(prompt))
        engine.add_request(str(index), list(prompt), SamplingParams(temperature=0, max_tokens=most))
    token_ids: list[list[int]] = [[] for _ in prompts]
    num_steps = 0
    while engine.has_requests:
        for output in engine.step():
            token_ids[int(output.request_id)] += output.token_ids
            if output.stats is not None:
                num_steps += output.stats.num_steps
                on_progress(1)
    return Answers(token_ids, sum(map(len, token_ids)) / max(1, num_steps))


def measure_reference(
    config: EngineConfig,
    ranks: Ranks,
    prompts: Sequence[Sequence[int]],
    *,
    draft_len: int,
    max_tokens: int,
    on_progress: OnProgress = ignore_progress,
) -> Reference:
    """Answer ``prompts`` without a budget and score the answers; ``on_progress`` is told of each twice."""
    config = with_drafts(config, draft_len, None)
    answers = greedy_answers(config, ranks, prompts, max_tokens, on_progress)
    texts = [Text(prompt, output) for prompt, output in zip(prompts, answers.token_ids, strict=True)]
    scores = score_texts(config, ranks, texts, on_progress)
    return Reference(answers, texts, scores, count_experts(config, ranks, texts))


def measure_budget(
    config: EngineConfig,
    ranks: Ranks,
    questions: Sequence[Question],
    reference: Reference,
    budget: ExpertBudget,
    decode: Callable[[Sequence[int]], str],
    *,
    draft_len: int,
    max_tokens: int,
    on_progress: OnProgress = ignore_progress,
) -> BudgetQuality:
    """Answer ``questions``, whose reference is ``reference``, under ``budget``, and score the reference's answers.

    ``config``, ``draft_len`` and ``max_tokens`` are those of the reference; ``decode`` returns the text of tokens;
    ``on_progress`` is told of each question twice.
    """
    config = with_drafts(config, draft_len, budget)
    answers = greedy_answers(config, ranks, [question.prompt for question in questions], max_tokens, on_progress)
    scores = score_texts(config, ranks, reference.texts, on_progress)
    agreement, num_tokens = next_token_agreement(reference.scores, scores)
    return BudgetQuality(
        matches=exact_matches(questions, reference.answers, answers, decode),
        num_tokens=num_tokens,
        agreement=agreement,
        perplexity_ratio=perplexity_ratio(reference.scores, scores),
        experts_per_layer=count_experts(config, ranks, reference.texts),
        kept_weight=scores.kept_weight / scores.num_budgeted_rows if scores.num_budgeted_rows else None,
        tokens_per_step=answers.tokens_per_step,
    )


def count_experts(config: EngineConfig, ranks: Ranks, texts: Sequence[Text]) -> float:
    """Return the distinct experts that a verification alone in its step computes per MoE layer, of all ranks.

    Of the first `NUM_COUNTED` texts.
    """
    return score_texts(replace(config, max_num_seqs=1), ranks, texts[:NUM_COUNTED]).experts_per_layer


def exact_matches(
    questions: Sequence[Question], reference: Answers, other: Answers, decode: Callable[[Sequence[int]], str]
) -> PairedMatches | None:
    """Compare two sets of answers with the right ones, special tokens left to ``decode``; None where none is known."""
    known = [index for index, question in enumerate(questions) if question.answer is not None]
    if not known:
        return None
    return paired_matches(
        [decode(reference.token_ids[index]) for index in known],
        [decode(other.token_ids[index]) for index in known],
        [questions[index].answer or "" for index in known],
    )


def next_token_agreement(reference: TextScores, other: TextScores) -> tuple[float, int]:
    """Return the share of tokens in whose place both find the same token likeliest, and the number of tokens.

    1 where there are none. Both are of the same texts.
    """
    pairs = [
        score.top_id == found[place].top_id
        for wanted, found in zip(reference.tokens, other.tokens, strict=True)
        for place, score in wanted.items()
        if place in found
    ]
    return (sum(pairs) / len(pairs) if pairs else 1.0), len(pairs)


def perplexity_ratio(reference: TextScores, other: TextScores) -> float:
    """Return how much larger the texts' perplexity is to ``other``; 1 where there are no tokens."""
    differences = [
        score.logprob - found[place].logprob
        for wanted, found in zip(reference.tokens, other.tokens, strict=True)
        for place, score in wanted.items()
        if place in found
    ]
    return math.exp(sum(differences) / len(differences)) if differences else 1.0
