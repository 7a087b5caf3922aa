"""Texts that are known beforehand, computed as they would be if the model itself wrote them now.

Engine, scheduler, drafter and budget are the real ones, and so are the rows of every step; only what a row is answered
with is the text's own next token, whose log-probability is kept. A draft is accepted where it equals the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ...workers.model_info import RankInfo
from ...workers.plan import Logprobs, RankPlan, RequestPlan, StepPlan, StepResult
from ...workers.sampling_params import SamplingParams, TokenSampling
from ..config import EngineConfig
from ..engine.engine import Engine
from ..engine.ranks import Ranks, Replacement

_SCORING = TokenSampling(prompt_logprobs=1)

OnProgress = Callable[[int], None]
"""Told how many more texts are done."""


def ignore_progress(num_done: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and what follows it."""

    prompt: Sequence[int]
    output: Sequence[int]
    """At least one token."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """What the model made of the place of one token of a text."""

    logprob: float
    """Of the text's token: natural logarithm."""
    top_id: int
    """The likeliest token."""


@dataclass(slots=True)
class TextScores:
    """What came of computing texts."""

    tokens: list[dict[int, TokenScore]]
    """Per text, by place in its output: all but the first token, which a prompt's chunk yields."""
    expert_counts: list[float] = field(default_factory=list)
    """Per step that verified drafts and computed no prompt: distinct experts computed per MoE layer, of all ranks."""
    num_budgeted_rows: int = 0
    kept_weight: float = 0.0
    """Summed over those rows and all layers: the share of their routers' weight that the budget kept."""

    @property
    def experts_per_layer(self) -> float:
        """Mean of ``expert_counts``; 0 where no step verified a draft."""
        return sum(self.expert_counts) / len(self.expert_counts) if self.expert_counts else 0.0


class TeacherForcedRanks:
    """Ranks of one engine run that answer with the texts. ``texts``: in the order in which the engine is given them."""

    def __init__(self, ranks: Ranks, texts: Sequence[Text]) -> None:
        self.infos: list[RankInfo] = ranks.infos
        self._ranks = ranks
        self._texts = [[*text.prompt, *text.output] for text in texts]
        self._prompt_lens = [len(text.prompt) for text in texts]
        self.scores = TextScores([{} for _ in texts])

    def step(self, plan: StepPlan) -> StepResult:
        """Run the step with its rows scored, not sampled, and answer with the texts' tokens."""
        tokens = [[self._next_tokens(part) for part in rank.requests] for rank in plan.ranks]
        forced = [_scored(rank, own) for rank, own in zip(plan.ranks, tokens, strict=True)]
        result = self._ranks.step(replace(plan, ranks=forced))
        for rank in result.ranks:
            for key, logprobs in rank.prompt_logprobs.items():
                self._keep(key, forced[rank.rank], logprobs)
        self._count(plan, result)
        ranks = [
            replace(rank, token_ids=own, prompt_logprobs={}) for rank, own in zip(result.ranks, tokens, strict=True)
        ]
        return replace(result, ranks=ranks)

    def recover(self, generation: int) -> Sequence[Replacement]:
        """As the ranks do."""
        return self._ranks.recover(generation)

    def close(self) -> None:
        """The ranks stay: others may use them."""

    def _next_tokens(self, part: RequestPlan) -> list[int]:
        """Return the drafts that the text accepts and the token after them, as far as the text goes."""
        if not part.num_sampled_rows:
            return []
        first = part.committed_len + part.first_sampled_row + 1
        text, drafts = self._texts[part.request_id][first:], part.token_ids[part.first_sampled_row + 1 :]
        num_right = 0
        while num_right < len(drafts) and text[num_right] == drafts[num_right] and num_right + 1 < len(text):
            num_right += 1
        return text[: num_right + 1]

    def _keep(self, key: int, plan: RankPlan, logprobs: Logprobs) -> None:
        part = next(part for part in plan.requests if part.request_id == key)
        start = part.committed_len + 1 - self._prompt_lens[key]
        for index, (value, ids) in enumerate(zip(logprobs.values, logprobs.token_ids, strict=True)):
            self.scores.tokens[key][start + index] = TokenScore(value[0], ids[1])

    def _count(self, plan: StepPlan, result: StepResult) -> None:
        parts = [part for rank in plan.ranks for part in rank.requests]
        counts = [rank.counts for rank in result.ranks]
        if all(part.first_sampled_row == 0 for part in parts) and any(part.num_sampled_rows > 1 for part in parts):
            num_layers = max(1, self.infos[0].model.num_moe_layers)
            self.scores.expert_counts.append(sum(sum(rank.experts) for rank in counts) / num_layers)
        self.scores.num_budgeted_rows += sum(sum(rank.budgeted_rows) for rank in counts)
        self.scores.kept_weight += sum(sum(rank.weight_kept) for rank in counts)


def _scored(plan: RankPlan, tokens: Sequence[list[int]]) -> RankPlan:
    """Return ``plan`` with rows that yield no token; those that follow the prompt are scored."""
    parts = []
    for part, wanted in zip(plan.requests, tokens, strict=True):
        targets = wanted if part.first_sampled_row == 0 and part.committed_len else []
        parts.append(
            replace(part, first_sampled_row=len(part.token_ids), sampling=_SCORING, targets=targets) if wanted else part
        )
    return replace(plan, requests=parts)


def score_texts(
    config: EngineConfig, ranks: Ranks, texts: Sequence[Text], on_progress: OnProgress = ignore_progress
) -> TextScores:
    """Compute ``texts``, ``config.max_num_seqs`` at a time on each rank, as ``config`` drafts and budgets.

    Raises ``ValueError`` for a text that is longer than the model's context.
    """
    forced = TeacherForcedRanks(ranks, texts)
    engine = Engine(config, forced)
    for index, text in enumerate(texts):
        # Beyond the end there is room for whole drafts, as in an answer whose end nobody knows
        room = engine.model.max_model_len - len(text.prompt)
        most = max(len(text.output), min(len(text.output) + config.fixed_draft_len + 1, room))
        sampling = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
        engine.add_request(str(index), list(text.prompt), sampling)
    while engine.has_requests:
        for output in engine.step():
            if output.offset + len(output.token_ids) == len(texts[int(output.request_id)].output):
                engine.abort(output.request_id)
                on_progress(1)
    return forced.scores
