"""Steps that fail or are interrupted leave no trace but a count, until there are too many in a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from penstock.cluster.engine.backend import EngineDeadError
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.output import ERROR
from penstock.workers.plan import StepFailedError, StepPlan, StepRefusedError, StepResult
from penstock.workers.sampling_params import SamplingParams

from .tiny_engine import GREEDY, PROMPTS, FailingRanks, Published, drain, generate


@pytest.mark.parametrize("sampling", [GREEDY, replace(GREEDY, temperature=1.0, seed=4)])
def test_failed_steps_leave_no_trace_but_a_count(make_engine: Callable[..., Engine], sampling: SamplingParams) -> None:
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 16, "draft_len": 5, "max_step_retries": 2}
    expected = make_engine(**options)
    tokens = generate(expected, PROMPTS, sampling)
    failed = {1, 3, 4, 7, 8, 13, 20}
    engine = make_engine(lambda ranks: FailingRanks(ranks, lambda call: call in failed), **options)
    assert generate(engine, PROMPTS, sampling) == tokens
    ranks: Any = engine.ranks
    assert ranks.recovered == list(range(1, len(failed) + 1))
    assert [plan.generation for plan in ranks.plans[:5]] == [0, 1, 1, 2, 3]
    stats, wanted = engine.stats(), expected.stats()
    assert stats.num_failed_steps == len(failed)
    for name in ("num_steps", "num_generation_tokens", "num_prompt_tokens", "spec_decode_num_draft_tokens"):
        assert getattr(stats, name) == getattr(wanted, name), name
    # An answer is told from those of a discarded step by generation and step
    assert len({(plan.generation, plan.step_id) for plan in ranks.plans}) == len(ranks.plans)


@pytest.mark.parametrize("retries", [0, 2])
def test_too_many_failures_in_a_row_kill_the_engine(make_engine: Callable[..., Engine], retries: int) -> None:
    engine = make_engine(lambda ranks: FailingRanks(ranks, lambda call: call > 3), max_step_retries=retries)
    engine.add_request("a", PROMPTS[0], GREEDY)
    published = [engine.step() for _ in range(3)]
    assert all(published)
    for _ in range(retries):
        assert engine.step() == []
    with pytest.raises(EngineDeadError, match=f"failed {retries + 1} times in a row: planted"):
        engine.step()
    assert engine.stats().num_failed_steps == retries + 1
    outputs = engine.fail_all("gone")
    assert [(o.request_id, o.finish_reason, o.error) for o in outputs] == [("a", ERROR, "gone")]
    assert outputs[0].offset == sum(len(o.token_ids) for step in published for o in step)
    assert not engine.has_requests
    engine.scheduler.check_integrity()


def test_ranks_that_are_to_be_brought_together_have_failed_nothing(make_engine: Callable[..., Engine]) -> None:
    class Returning(FailingRanks):
        def step(self, plan: StepPlan) -> StepResult:
            try:
                return super().step(plan)
            except StepFailedError:
                raise StepRefusedError("rank 1 has loaded") from None

    expected = generate(make_engine(), PROMPTS, GREEDY)
    engine = make_engine(lambda ranks: Returning(ranks, lambda call: call in (4, 5, 9)), max_step_retries=0)
    assert generate(engine, PROMPTS, GREEDY) == expected
    ranks: Any = engine.ranks
    assert ranks.recovered == [1, 2, 3]
    assert engine.stats().num_failed_steps == 0


def test_a_step_that_was_interrupted_is_never_planned_again_under_its_number(
    make_engine: Callable[..., Engine],
) -> None:
    # Ctrl-C in `LLM.generate`: remote ranks answer that step later, and the answer must fit no other plan
    class Interrupted(FailingRanks):
        def step(self, plan: StepPlan) -> StepResult:
            try:
                return super().step(plan)
            except StepFailedError:
                raise KeyboardInterrupt from None

    expected = generate(make_engine(), PROMPTS[:2], GREEDY)
    engine = make_engine(lambda ranks: Interrupted(ranks, lambda call: call == 4))
    tokens = Published()
    for index in range(2):
        engine.add_request(str(index), PROMPTS[index], GREEDY)
    for _ in range(3):
        tokens.take(engine.step())
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    drain(engine, tokens)
    assert [tokens["0"], tokens["1"]] == expected
    plans = engine.ranks.plans  # type: ignore[attr-defined]
    assert len({(plan.generation, plan.step_id) for plan in plans}) == len(plans)
