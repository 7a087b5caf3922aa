"""What drafters propose and controllers choose changes the pace, the counts, and no token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from penstock.cluster.engine import engine as engine_module
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.output import LENGTH
from penstock.cluster.speculation.batch import Batch
from penstock.cluster.speculation.fixed import FixedController
from penstock.cluster.speculation.ngram import NgramDrafter
from penstock.cluster.speculation.observation import ShadowTrial, StepObservation
from penstock.cluster.speculation.proposal import Proposal
from penstock.workers.runner import ModelRunner

from .tiny_engine import GREEDY, PROMPTS, generate


def test_no_drafter_is_made_or_asked_without_drafts(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Spy(NgramDrafter):
        def propose(self, max_draft_len: int) -> Proposal:
            asked.append(max_draft_len)
            return super().propose(max_draft_len)

    made: list[Spy] = []
    monkeypatch.setattr(
        engine_module, "drafter_factory", lambda name: lambda context, store: made.append(Spy(3, 1)) or made[-1]
    )
    engines = [make_engine(draft_len=0), make_engine(speculation="off"), make_engine(speculation="cascade")]
    plain = generate(engines[0], PROMPTS, GREEDY)
    assert (made, asked) == ([], [])
    assert engines[0].stats().spec_decode_num_draft_tokens == 0
    assert generate(engines[1], PROMPTS, GREEDY) == plain
    # Cascade measures plain steps before it drafts at all
    assert generate(engines[2], PROMPTS[:1], replace(GREEDY, max_tokens=4)) == [plain[0][:4]]
    assert (made, asked) == ([], [])
    assert generate(make_engine(draft_len=3), PROMPTS, GREEDY) == plain
    assert set(asked) == {1, 2, 3}, "never more than may still come, never nothing"
    assert len(made) == len(PROMPTS), "one a request"


@pytest.mark.parametrize("draft_len", [0, 3])
def test_a_long_prompt_is_indexed_chunk_by_chunk(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, draft_len: int
) -> None:
    extended: list[int] = []

    class Spy(NgramDrafter):
        def extend(self, token_ids: Sequence[int]) -> None:
            extended.append(len(token_ids))
            super().extend(token_ids)

    monkeypatch.setattr(engine_module, "drafter_factory", lambda name: lambda context, store: Spy(3, 1))
    prompt = [(5 * i) % 90 + 3 for i in range(80)]
    engine = make_engine(draft_len=draft_len, max_num_seqs=4, max_num_batched_tokens=32)
    generate(engine, [prompt], replace(GREEDY, max_tokens=4))
    assert extended[:3] == ([32, 32, 17] if draft_len else []), "the last chunk comes with the first token"


class Restless(FixedController):
    """A controller that changes its mind every time, and checks what it is told."""

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__(max(lengths))
        self.lengths, self.asked = lengths, 0
        self.drafted = self.accepted = 0
        self.every: list[int] = []

    def max_draft_lens(self, batch: Batch) -> list[int]:
        self.asked += 1
        return [min(self.lengths[self.asked % len(self.lengths)], request.max_draft_len) for request in batch.requests]

    def observe(self, step: StepObservation) -> None:
        assert sum(step.rows) >= len(step.requests)
        for outcome in step.requests:
            assert 0 <= outcome.num_accepted <= outcome.num_drafted
            self.drafted += outcome.num_drafted
            self.accepted += outcome.num_accepted
            if outcome.num_drafted:
                self.every.append(outcome.num_accepted)


@pytest.mark.parametrize(
    ("lengths", "temperature"), [([0, 5, 1, 3, 0, 7], 0.0), ([64], 0.0), ([1, 0], 0.0), ([0, 5, 1, 3, 0, 7], 0.8)]
)
def test_controllers_change_the_pace_and_never_the_tokens(
    make_engine: Callable[..., Engine], lengths: list[int], temperature: float
) -> None:
    sampling = replace(GREEDY, temperature=temperature, seed=3)
    expected = generate(make_engine(draft_len=0), PROMPTS, sampling)
    controller = Restless(lengths)
    engine = make_engine(controller=controller, max_num_batched_tokens=40)
    assert generate(engine, PROMPTS, sampling) == expected
    stats = engine.stats()
    assert stats.spec_decode_num_draft_tokens == controller.drafted > 0
    assert stats.spec_decode_num_accepted_tokens == controller.accepted
    per_pos = stats.spec_decode_num_accepted_tokens_per_pos
    assert per_pos == [sum(accepted > position for accepted in controller.every) for position in range(len(per_pos))]


class Halving(FixedController):
    """Verifies half of every proposal, and keeps what it is told."""

    wants_trials = True

    def __init__(self) -> None:
        super().__init__(6)
        self.wanted: list[int] = []
        self.steps: list[StepObservation] = []
        self.trials: list[ShadowTrial] = []
        self.forgotten: list[int] = []

    def draft_lens(self, batch: Batch, proposals: Sequence[Proposal]) -> list[int]:
        lengths = [len(proposal) // 2 for proposal in proposals]
        self.wanted = lengths
        return lengths

    def observe(self, step: StepObservation) -> None:
        assert not {outcome.key for outcome in step.requests} & set(self.forgotten)
        if not step.has_prefill:
            assert [outcome.num_drafted for outcome in step.requests] == self.wanted
        self.steps.append(step)

    def learn(self, trials: Sequence[ShadowTrial]) -> None:
        assert not {trial.key for trial in trials} & set(self.forgotten)
        if trials:
            assert {trial.key for trial in trials} <= {outcome.key for outcome in self.steps[-1].requests}
        self.trials += trials

    def forget(self, key: int) -> None:
        self.forgotten.append(key)


def test_the_controller_has_its_way_and_learns_what_came_of_it(
    make_engine: Callable[..., Engine], runner: ModelRunner
) -> None:
    controller = Halving()
    engine = make_engine(controller=controller)
    expected = generate(make_engine(draft_len=0), PROMPTS, GREEDY)
    assert generate(engine, PROMPTS, GREEDY) == expected
    steps, stats = controller.steps, engine.stats()
    assert len(steps) == stats.num_steps
    assert sorted(controller.forgotten) == list(range(len(PROMPTS)))
    outcomes = [outcome for step in steps for outcome in step.requests]
    assert sum(outcome.num_drafted for outcome in outcomes) == stats.spec_decode_num_draft_tokens > 0
    assert sum(outcome.num_accepted for outcome in outcomes) == stats.spec_decode_num_accepted_tokens > 0
    assert sum(outcome.num_tokens for outcome in outcomes) == stats.num_generation_tokens - len(PROMPTS)
    assert steps[0].has_prefill
    assert not steps[-1].has_prefill
    top_k, num_experts = runner.info.model.num_experts_per_tok, runner.info.model.num_experts
    for step in steps:
        assert step.step_s > 0
        assert top_k <= step.experts[0] <= min(num_experts, top_k * step.rows[0])
        assert step.rows_sent == [0]
        if not step.has_prefill:
            assert step.rows == [len(step.requests) + sum(outcome.num_drafted for outcome in step.requests)]
    trials = controller.trials
    assert max(trial.num_known for trial in trials) > 3, "what was not verified is learned from, too"
    assert sum(trial.num_right > trial.first for trial in trials) > 0


def test_speculation_is_counted_consistently(make_engine: Callable[..., Engine]) -> None:
    plain, drafted = make_engine(draft_len=0), make_engine(draft_len=4)
    sampling = replace(GREEDY, max_tokens=40)
    assert generate(plain, PROMPTS, sampling) == generate(drafted, PROMPTS, sampling)
    stats = drafted.stats()
    per_pos = stats.spec_decode_num_accepted_tokens_per_pos
    assert sum(per_pos) == stats.spec_decode_num_accepted_tokens > 0
    assert per_pos == sorted(per_pos, reverse=True), "a draft counts only after those before it"
    assert len(per_pos) == 4
    assert per_pos[0] <= stats.spec_decode_num_drafts
    assert stats.spec_decode_num_accepted_tokens < stats.spec_decode_num_draft_tokens
    assert stats.num_generation_tokens == 40 * len(PROMPTS) == plain.stats().num_generation_tokens
    assert stats.num_prompt_tokens == sum(map(len, PROMPTS))
    assert stats.num_steps < plain.stats().num_steps
    assert stats.num_requests_finished == {LENGTH: len(PROMPTS)}
    assert (stats.num_requests_running, stats.num_requests_waiting) == (0, 0)


def test_tokens_after_a_stop_are_counted_nowhere(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = generate(make_engine(draft_len=0), [PROMPTS[0]], GREEDY)[0]

    class Oracle:
        def __init__(self) -> None:
            self.num_known = -len(PROMPTS[0])

        def extend(self, token_ids: Sequence[int]) -> None:
            self.num_known += len(token_ids)

        def propose(self, max_draft_len: int) -> Proposal:
            return Proposal(free[self.num_known :][:max_draft_len])

    monkeypatch.setattr(engine_module, "drafter_factory", lambda name: lambda context, store: Oracle())
    engine = make_engine(draft_len=7)
    assert generate(engine, [PROMPTS[0]], GREEDY) == [free]
    assert engine.stats().num_steps < 6
    for stop in sorted(set(free), key=free.index)[1:]:
        engine = make_engine(draft_len=7)
        (tokens,) = generate(engine, [PROMPTS[0]], replace(GREEDY, stop_token_ids=(stop,)))
        stats = engine.stats()
        assert stats.num_generation_tokens == len(tokens) == free.index(stop) + 1
        assert stats.spec_decode_num_accepted_tokens < len(tokens)
        assert stats.decode_tokens == len(tokens) - 1, "the first came with the prompt"
