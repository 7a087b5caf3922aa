"""Predictions that requests bring along: what is accepted of them, and that they change no token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.output import RequestOutput
from penstock.cluster.engine.ranks import LocalRanks, make_runner
from penstock.cluster.speculation.batch import Batch
from penstock.cluster.speculation.fixed import FixedController
from penstock.cluster.speculation.observation import StepObservation
from penstock.cluster.speculation.options import SpeculationOptions
from penstock.cluster.speculation.proposal import Proposal

from .recorded_wishes import GREEDY, NEVER, OFF, PROMPT, PROMPTS, predicting, real_config, run, scripted
from .scripted_ranks import continuation


class Witness(FixedController):
    """Counts what was proposed from predictions and what became of it, by the controller's contract alone."""

    def __init__(self, draft_len: int) -> None:
        super().__init__(draft_len)
        self.sources: dict[int, str] = {}
        self.num_drafted = self.num_accepted = 0

    def draft_lens(self, batch: Batch, proposals: Sequence[Proposal]) -> list[int]:
        self.sources = {
            request.key: proposal.evidence.source for request, proposal in zip(batch.requests, proposals, strict=True)
        }
        return super().draft_lens(batch, proposals)

    def observe(self, step: StepObservation) -> None:
        for outcome in step.requests:
            if self.sources.get(outcome.key) == "prediction":
                self.num_drafted += outcome.num_drafted
                self.num_accepted += outcome.num_accepted


def counts(output: RequestOutput) -> tuple[int, int]:
    assert output.stats is not None
    stats = output.stats
    drafts = output.prediction_drafts
    counted = (stats.num_accepted_prediction_tokens, stats.num_rejected_prediction_tokens)
    drafted, accepted = sum(d.num_drafted for d in drafts), sum(d.num_accepted for d in drafts)
    assert counted == (accepted, drafted - accepted), "the outputs say the same as the statistics"
    return counted


def test_a_right_prediction_is_accepted_to_the_last_token() -> None:
    answer = continuation(PROMPT, 20)
    [output] = run(scripted(), [(PROMPT, predicting(*answer))])
    assert output.token_ids == answer
    # The first token comes with the prompt, then 3 drafts and one more four times, then the 2 that leave room for one
    assert counts(output) == (14, 0)
    assert output.stats is not None
    assert output.stats.num_steps == 6
    assert output.stats.mean_draft_len == 14 / 6


@pytest.mark.parametrize("drafter", ["prediction", "ngram"])
def test_accepted_and_rejected_are_what_the_controller_saw(drafter: str) -> None:
    answer = continuation(PROMPT, 20)
    witness = Witness(3)
    half_right = predicting(*answer[:9], *NEVER, *answer[12:])
    [output] = run(scripted(controller=witness, drafter=drafter), [(PROMPT, half_right)])
    assert output.token_ids == answer
    accepted, rejected = counts(output)
    assert (accepted, accepted + rejected) == (witness.num_accepted, witness.num_drafted)
    assert accepted >= 6
    assert rejected >= 3
    assert output.stats is not None
    if drafter == "prediction":
        assert accepted + rejected == output.stats.num_draft_tokens
    else:
        assert accepted + rejected < output.stats.num_draft_tokens, "the n-grams' are not the prediction's"


def test_a_prediction_of_something_else_counts_nothing() -> None:
    [output] = run(scripted(), [(PROMPT, predicting(*NEVER))])
    assert output.token_ids == continuation(PROMPT, 20)
    assert counts(output) == (0, 0)


def test_without_a_prediction_drafts_count_as_none() -> None:
    [output] = run(scripted(drafter="suffix"), [(PROMPT * 4, SpeculationOptions())])
    assert output.stats is not None
    assert output.stats.num_draft_tokens > 0
    assert counts(output) == (0, 0)


@pytest.mark.parametrize("options", [{"speculation": "off"}, {"draft_len": 0}])
def test_a_server_that_does_not_speculate_takes_a_prediction_and_counts_nothing(options: dict[str, Any]) -> None:
    answer = continuation(PROMPT, 20)
    [output] = run(scripted(**options), [(PROMPT, predicting(*answer))])
    assert output.token_ids == answer
    assert counts(output) == (0, 0)
    assert output.stats is not None
    assert (output.stats.phase, output.stats.num_draft_tokens) == ("off", 0)


def test_steps_planned_again_count_once() -> None:
    wish = (PROMPT, predicting(*continuation(PROMPT, 9), *NEVER))
    engine = scripted(failed=(2, 3, 5, 8))
    [expected], [output] = run(scripted(), [wish]), run(engine, [wish])
    assert engine.stats().num_failed_steps == 4
    assert output.token_ids == expected.token_ids
    assert counts(output) == counts(expected)


def test_a_request_that_is_replayed_keeps_its_prediction() -> None:
    prompts = [PROMPT, [6, 4, 8, 8], [5] * 6]
    wishes = [(prompt, predicting(*continuation(prompt, 20))) for prompt in prompts]
    engine = scripted(blocks=(16,))
    outputs = run(engine, wishes, replace(GREEDY, max_tokens=40))
    assert engine.stats().num_preemptions > 0
    replayed = [output for output in outputs if output.stats is not None and output.stats.num_preemptions]
    assert replayed
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output.token_ids == continuation(prompt, 40)
        assert counts(output)[0] >= 12


def test_a_prediction_that_is_no_prediction_of_this_model_is_refused() -> None:
    engine = scripted()
    with pytest.raises(ValueError, match=r"^prediction.content: 65 tokens are more than max_model_len, 64"):
        engine.add_request("a", PROMPT, GREEDY, predicting(*[5] * 65))
    with pytest.raises(ValueError, match=r"^prediction.content: token ids must be in \[0, 8\]"):
        engine.add_request("a", PROMPT, GREEDY, predicting(9))
    assert not engine.has_requests


@pytest.fixture(scope="module")
def one_rank(checkpoint: Callable[[str], Path]) -> tuple[LocalRanks, EngineConfig]:
    config = real_config(checkpoint("qwen3_moe"), 1)
    return LocalRanks(make_runner(config, 0)), config


def predictions(answer: Sequence[int]) -> list[SpeculationOptions]:
    """Return right, half right and nonsensical predictions of ``answer``."""
    wrong = [token + 1 for token in answer]
    middle = len(answer) // 2
    return [
        predicting(*tokens)
        for tokens in (
            answer,
            answer[:5],
            [*answer[:middle], *wrong[middle:]],
            [*wrong[:middle], *answer[middle:]],
            [token for pair in zip(answer, wrong, strict=True) for token in pair],
            wrong,
            [90] * 30,
        )
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_no_prediction_changes_a_token(one_rank: tuple[LocalRanks, EngineConfig], temperature: float) -> None:
    ranks, config = one_rank
    sampling = replace(GREEDY, temperature=temperature, seed=5)
    answers = [
        output.token_ids for output in run(Engine(config, ranks), [(prompt, OFF) for prompt in PROMPTS], sampling)
    ]
    accepted = rejected = 0
    for wishes in zip(*map(predictions, answers), strict=True):
        outputs = run(Engine(config, ranks), list(zip(PROMPTS, wishes, strict=True)), sampling)
        assert [output.token_ids for output in outputs] == answers
        accepted += sum(counts(output)[0] for output in outputs)
        rejected += sum(counts(output)[1] for output in outputs)
    assert accepted > 100
    assert rejected > 10
