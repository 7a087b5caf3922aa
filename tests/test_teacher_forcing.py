"""Texts that are known, computed step by step as if the model wrote them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.cluster.calibration.quality import greedy_answers
from penstock.cluster.calibration.teacher_forcing import Text, TextScores, score_texts
from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.ranks import LocalRanks, Ranks, make_runner
from penstock.cluster.transport.process_ranks import ProcessRanks

from .tiny_engine import PROMPTS, config_of

OUTPUTS = [
    [60, 33, 8, 71, 11, 44, 60, 33, 8, 71, 11, 44, 5, 17, 60],
    [9, 3, 9, 3, 50, 3, 9, 3, 9, 3, 9],
    [7],
    [41, 41, 41, 12, 41, 41],
    [51, 52, 50, 51, 53, 50, 51, 52],
]
TEXTS = [Text(prompt, output) for prompt, output in zip(PROMPTS, OUTPUTS, strict=True)]


@pytest.fixture(scope="module")
def tiny(checkpoint: Callable[[str], Path]) -> tuple[EngineConfig, LocalRanks]:
    config = config_of(checkpoint("qwen3_moe"), speculation="fixed", draft_len=3)
    return config, LocalRanks(make_runner(config, 0))


@pytest.fixture(scope="module")
def wanted(tiny_model: Callable[[str], Any]) -> list[dict[int, tuple[float, int]]]:
    """Log-probability of each token after the first, and the likeliest in its place, by transformers at once."""
    model = tiny_model("qwen3_moe").eval()
    found = []
    for text in TEXTS:
        ids = [*text.prompt, *text.output]
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
        first = len(text.prompt)
        rows = {place: logprobs[first + place - 1] for place in range(1, len(text.output))}
        found.append({p: (float(row[text.output[p]]), int(row.argmax())) for p, row in rows.items()})
    return found


def check(scores: TextScores, wanted: Sequence[dict[int, tuple[float, int]]]) -> None:
    for found, expected in zip(scores.tokens, wanted, strict=True):
        assert set(found) == set(expected)
        for place, (logprob, top_id) in expected.items():
            assert found[place].logprob == pytest.approx(logprob, abs=1e-4)
            assert found[place].top_id == top_id


@pytest.mark.parametrize(("draft_len", "max_num_seqs"), [(0, 32), (3, 1), (3, 2), (7, 32)])
def test_drafts_change_nothing_without_a_budget(
    tiny: tuple[EngineConfig, LocalRanks], wanted: list[dict[int, tuple[float, int]]], draft_len: int, max_num_seqs: int
) -> None:
    config = replace(tiny[0], draft_len=draft_len, max_num_seqs=max_num_seqs)
    done: list[int] = []
    scores = score_texts(config, tiny[1], TEXTS, done.append)
    check(scores, wanted)
    assert sum(done) == len(TEXTS)
    assert (scores.num_budgeted_rows, scores.kept_weight) == (0, 0)
    assert bool(scores.expert_counts) == (draft_len > 0)


def test_a_text_may_end_with_the_context(tiny: tuple[EngineConfig, LocalRanks]) -> None:
    config, ranks = tiny
    room = ranks.infos[0].model.max_model_len - len(PROMPTS[1])
    scores = score_texts(config, ranks, [Text(PROMPTS[1], ([9, 3] * room)[:room])])
    assert set(scores.tokens[0]) == set(range(1, room))
    with pytest.raises(ValueError, match="max_model_len"):
        score_texts(config, ranks, [Text(PROMPTS[1], ([9, 3] * room)[: room + 1])])


@pytest.mark.parametrize("budget", ["experts=3,scope=request", "experts=3,scope=request,rest=truncation"])
def test_along_its_own_answer_the_budgeted_model_agrees_with_itself(
    tiny: tuple[EngineConfig, LocalRanks], budget: str
) -> None:
    """Rows, lists of experts and KV are those of a served request; a rejected draft's KV would show."""
    config, ranks = replace(tiny[0], expert_budget=budget), tiny[1]
    answers = greedy_answers(config, ranks, PROMPTS, max_tokens=24)
    # Less the end, where an answer has room for fewer drafts
    texts = [Text(prompt, ids[:16]) for prompt, ids in zip(PROMPTS, answers.token_ids, strict=True)]
    scores = score_texts(config, ranks, texts)
    for text, found in zip(texts, scores.tokens, strict=True):
        assert [found[place].top_id for place in sorted(found)] == text.output[1:]
    assert scores.num_budgeted_rows > 50
    exact = score_texts(replace(config, expert_budget=None), ranks, texts)
    assert any(
        exact.tokens[index][place].top_id != score.top_id
        for index, found in enumerate(scores.tokens)
        for place, score in found.items()
    ), "a budget of 3 of 8 must tell"


def test_lists_of_ones_own_make_scores_independent_of_batch_mates(tiny: tuple[EngineConfig, LocalRanks]) -> None:
    config = replace(tiny[0], expert_budget="experts=3,scope=request")
    together = score_texts(config, tiny[1], TEXTS)
    alone = score_texts(replace(config, max_num_seqs=1), tiny[1], TEXTS)
    for one, other in zip(together.tokens, alone.tokens, strict=True):
        assert {place: score.top_id for place, score in one.items()} == {p: s.top_id for p, s in other.items()}
        assert [s.logprob for s in one.values()] == pytest.approx([s.logprob for s in other.values()], abs=1e-4)
    assert together.kept_weight == pytest.approx(alone.kept_weight, rel=1e-4)
    assert max(alone.expert_counts) <= 3 < max(together.expert_counts)
    shared = score_texts(replace(config, expert_budget="experts=3"), tiny[1], TEXTS)
    assert shared.kept_weight < together.kept_weight


@pytest.fixture(scope="module")
def two_ranks(checkpoint: Callable[[str], Path]) -> Iterator[tuple[EngineConfig, Ranks]]:
    config = config_of(checkpoint("qwen3_moe"), 2, speculation="fixed", draft_len=3)
    with closing(ProcessRanks(config)) as ranks:
        yield config, ranks


@pytest.mark.distributed
def test_over_two_ranks_scores_are_the_same(
    two_ranks: tuple[EngineConfig, Ranks], wanted: list[dict[int, tuple[float, int]]]
) -> None:
    check(score_texts(*two_ranks, TEXTS), wanted)
