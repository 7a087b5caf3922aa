from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine import engine as engine_module
from penstock.cluster.engine.backend import EngineDeadError
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.engine_thread import EngineThread
from penstock.cluster.engine.output import ABORT, ERROR, LENGTH, STOP, RequestOutput
from penstock.cluster.engine.ranks import LocalRanks, make_runner
from penstock.cluster.speculation.batch import Batch
from penstock.cluster.speculation.fixed import FixedController
from penstock.cluster.speculation.ngram import NgramDrafter
from penstock.cluster.speculation.observation import StepObservation
from penstock.cluster.speculation.proposal import Proposal
from penstock.kernels.philox import gumbel
from penstock.workers.plan import StepFailedError, StepPlan, StepResult
from penstock.workers.runner import ModelRunner
from penstock.workers.sampler import filter_logits
from penstock.workers.sampling_params import SamplingParams

Greedy = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
PROMPTS = [
    [5, 17, 60, 33, 8, 71, 11, 44],
    [3, 9, 3, 9, 3, 9, 3, 9, 3, 9, 3],
    [(7 * i + 5) % 90 + 3 for i in range(30)],
    [41],
    [50, 51, 52, 50, 51, 52, 50],
]


class Tokens(dict[str, list[int]]):
    """What an engine published, checked as a reader would: offsets without gaps, nothing after the end."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[str, RequestOutput] = {}

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            mine = self.setdefault(output.request_id, [])
            assert output.offset == len(mine)
            before = self.last.get(output.request_id)
            assert before is None or before.finish_reason is None
            mine += output.token_ids
            self.last[output.request_id] = output


def drain(engine: Engine, tokens: Tokens | None = None) -> Tokens:
    tokens = Tokens() if tokens is None else tokens
    while engine.has_requests:
        tokens.take(engine.step())
        engine.scheduler.check_integrity()
    assert engine.stats().num_kv_blocks_used == 0
    return tokens


@pytest.fixture(scope="module")
def runner(checkpoint: Callable[[str], Path]) -> ModelRunner:
    """One loaded rank for all engines of these tests; a new engine starts at a generation that it has not seen."""
    return make_runner(config_of(checkpoint("qwen3_moe")), 0)


def config_of(directory: Path, **options: Any) -> EngineConfig:
    options = {"block_size": 4, "max_model_len": 96, "kv_cache_bytes": 1 << 20, **options}
    return EngineConfig(model=str(directory), **options)


@pytest.fixture
def make_engine(checkpoint: Callable[[str], Path], runner: ModelRunner) -> Callable[..., Engine]:
    def make(wrap: Callable[[LocalRanks], Any] = lambda ranks: ranks, controller: Any = None, **options: Any) -> Engine:
        runner.generation = -1
        config = config_of(checkpoint("qwen3_moe"), **options)
        return Engine(config, wrap(LocalRanks(runner)), controller=controller)

    return make


def generate(engine: Engine, prompts: Sequence[list[int]], sampling: SamplingParams) -> list[list[int]]:
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, sampling)
    tokens = drain(engine)
    return [tokens[str(index)] for index in range(len(prompts))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"draft_len": 0},
        {"draft_len": 7, "max_num_batched_tokens": 9, "max_num_seqs": 8},
        {"speculation": "off"},
        {"speculation": "cascade"},
        {"speculation": "shadow", "drafter": "suffix", "max_num_batched_tokens": 9, "max_num_seqs": 8},
    ],
)
def test_greedy_tokens_are_those_of_transformers(
    make_engine: Callable[..., Engine],
    checkpoint: Callable[[str], Path],
    reference: Callable[..., list[int]],
    options: dict[str, Any],
) -> None:
    expected = [reference(checkpoint("qwen3_moe"), prompt, 20, ignore_eos=True) for prompt in PROMPTS]
    engine = make_engine(**options)
    assert generate(engine, PROMPTS, Greedy) == expected
    assert generate(engine, PROMPTS, Greedy) == expected, "what it has learned changes nothing"


def test_an_abort_frees_blocks_and_leaves_the_others_alone(make_engine: Callable[..., Engine]) -> None:
    alone = [generate(make_engine(), [prompt], Greedy)[0] for prompt in PROMPTS[:3]]
    engine, tokens = make_engine(max_num_seqs=3), Tokens()
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, Greedy)
    for _ in range(3):
        tokens.take(engine.step())
    used = engine.stats().num_kv_blocks_used
    held = len(engine.scheduler.running[0][1].blocks)
    stats = engine.abort("1")
    assert stats is not None
    assert stats.num_output_tokens == len(tokens["1"]) > 0
    assert engine.stats().num_kv_blocks_used == used - held < used
    engine.scheduler.check_integrity()
    assert engine.abort("4") is not None, "a waiting one"
    assert engine.abort("1") is None
    assert engine.abort("nobody") is None
    seen = list(tokens["1"])
    drain(engine, tokens)
    assert [tokens["0"], tokens["2"]] == [alone[0], alone[2]]
    assert tokens["1"] == seen == alone[1][: len(seen)]
    assert "4" not in tokens
    assert engine.stats().num_requests_finished == {ABORT: 2, LENGTH: 3}


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
    plain = generate(engines[0], PROMPTS, Greedy)
    assert (made, asked) == ([], [])
    assert engines[0].stats().spec_decode_num_draft_tokens == 0
    assert generate(engines[1], PROMPTS, Greedy) == plain
    # Cascade measures plain steps before it drafts at all
    assert generate(engines[2], PROMPTS[:1], replace(Greedy, max_tokens=4)) == [plain[0][:4]]
    assert (made, asked) == ([], [])
    assert generate(make_engine(draft_len=3), PROMPTS, Greedy) == plain
    assert set(asked) == {1, 2, 3}, "never more than may still come, never nothing"
    assert len(made) == len(PROMPTS), "one a request"


class Failing:
    """Ranks whose steps fail when told to, after the real step has run and changed the KV pool."""

    def __init__(self, ranks: LocalRanks, fails: Callable[[int], bool]) -> None:
        self.ranks, self.fails = ranks, fails
        self.infos = ranks.infos
        self.calls = 0
        self.plans: list[StepPlan] = []
        self.recovered: list[int] = []

    def step(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        result = self.ranks.step(plan)
        self.calls += 1
        if self.fails(self.calls):
            raise StepFailedError("planted")
        return result

    def recover(self, generation: int) -> None:
        self.recovered.append(generation)

    def close(self) -> None:
        self.ranks.close()


@pytest.mark.parametrize("sampling", [Greedy, replace(Greedy, temperature=1.0, seed=4)])
def test_failed_steps_leave_no_trace_but_a_count(make_engine: Callable[..., Engine], sampling: SamplingParams) -> None:
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 16, "draft_len": 5, "max_step_retries": 2}
    expected = make_engine(**options)
    tokens = generate(expected, PROMPTS, sampling)
    failed = {1, 3, 4, 7, 8, 13, 20}
    engine = make_engine(lambda ranks: Failing(ranks, lambda call: call in failed), **options)
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
    engine = make_engine(lambda ranks: Failing(ranks, lambda call: call > 3), max_step_retries=retries)
    engine.add_request("a", PROMPTS[0], Greedy)
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


def test_a_step_that_was_interrupted_is_never_planned_again_under_its_number(
    make_engine: Callable[..., Engine],
) -> None:
    # Ctrl-C in `LLM.generate`: remote ranks answer that step later, and the answer must fit no other plan
    class Interrupted(Failing):
        def step(self, plan: StepPlan) -> StepResult:
            try:
                return super().step(plan)
            except StepFailedError:
                raise KeyboardInterrupt from None

    expected = generate(make_engine(), PROMPTS[:2], Greedy)
    engine = make_engine(lambda ranks: Interrupted(ranks, lambda call: call == 4))
    tokens = Tokens()
    for index in range(2):
        engine.add_request(str(index), PROMPTS[index], Greedy)
    for _ in range(3):
        tokens.take(engine.step())
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    drain(engine, tokens)
    assert [tokens["0"], tokens["1"]] == expected
    plans = engine.ranks.plans  # type: ignore[attr-defined]
    assert len({(plan.generation, plan.step_id) for plan in plans}) == len(plans)


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
    sampling = replace(Greedy, temperature=temperature, seed=3)
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

    def forget(self, key: int) -> None:
        self.forgotten.append(key)


def test_the_controller_has_its_way_and_learns_what_came_of_it(
    make_engine: Callable[..., Engine], runner: ModelRunner
) -> None:
    controller = Halving()
    engine = make_engine(controller=controller)
    expected = generate(make_engine(draft_len=0), PROMPTS, Greedy)
    assert generate(engine, PROMPTS, Greedy) == expected
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
    trials = [trial for step in steps for trial in step.trials]
    assert max(trial.num_known for trial in trials) > 3, "what was not verified is learned from, too"
    assert sum(trial.num_right > trial.first for trial in trials) > 0


def test_speculation_is_counted_consistently(make_engine: Callable[..., Engine]) -> None:
    plain, drafted = make_engine(draft_len=0), make_engine(draft_len=4)
    sampling = replace(Greedy, max_tokens=40)
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
    free = generate(make_engine(draft_len=0), [PROMPTS[0]], Greedy)[0]

    class Oracle:
        def __init__(self) -> None:
            self.num_known = -len(PROMPTS[0])

        def extend(self, token_ids: Sequence[int]) -> None:
            self.num_known += len(token_ids)

        def propose(self, max_draft_len: int) -> Proposal:
            return Proposal(free[self.num_known :][:max_draft_len])

    monkeypatch.setattr(engine_module, "drafter_factory", lambda name: lambda context, store: Oracle())
    engine = make_engine(draft_len=7)
    assert generate(engine, [PROMPTS[0]], Greedy) == [free]
    assert engine.stats().num_steps < 6
    for stop in sorted(set(free), key=free.index)[1:]:
        engine = make_engine(draft_len=7)
        (tokens,) = generate(engine, [PROMPTS[0]], replace(Greedy, stop_token_ids=(stop,)))
        stats = engine.stats()
        assert stats.num_generation_tokens == len(tokens) == free.index(stop) + 1
        assert stats.spec_decode_num_accepted_tokens < len(tokens)
        assert stats.decode_tokens == len(tokens) - 1, "the first came with the prompt"


def test_a_requests_own_counts_add_up(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(draft_len=4)
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, replace(Greedy, max_tokens=30))
    tokens = drain(engine)
    every = [tokens.last[str(index)].stats for index in range(len(PROMPTS))]
    for prompt, stats in zip(PROMPTS, every, strict=True):
        assert stats is not None
        assert (stats.num_prompt_tokens, stats.num_output_tokens) == (len(prompt), 30)
        # Each step that yields tokens yields one of its own, unless the limit cut it off
        assert stats.num_steps + stats.num_accepted_tokens in (30, 31)
        assert 0 <= stats.queue_s <= stats.ttft_s <= stats.total_s
    total = engine.stats()
    assert sum(s.num_draft_tokens for s in every if s) == total.spec_decode_num_draft_tokens
    assert sum(s.num_accepted_tokens for s in every if s) == total.spec_decode_num_accepted_tokens


@pytest.mark.parametrize("draft_len", [0, 6])
def test_the_first_of_eos_stop_token_and_limit_ends_a_request(
    make_engine: Callable[..., Engine], draft_len: int
) -> None:
    free = generate(make_engine(draft_len=draft_len), [PROMPTS[0]], Greedy)[0]
    model = make_engine().model
    assert model.eos_token_ids == (2,)

    def run(sampling: SamplingParams, eos: int = 2) -> tuple[list[int], str | None, int | None]:
        engine = make_engine(draft_len=draft_len)
        engine.model = replace(model, eos_token_ids=(eos,))
        engine.add_request("a", PROMPTS[0], sampling)
        tokens = drain(engine)
        return tokens["a"], tokens.last["a"].finish_reason, tokens.last["a"].stop_token_id

    for at in (0, 7):
        token = free[at]
        first = free.index(token)
        cut = (free[: first + 1], STOP, token)
        assert run(replace(Greedy, stop_token_ids=(95, token))) == cut
        assert run(replace(Greedy, ignore_eos=False), eos=token) == cut
        assert run(Greedy, eos=token) == (free, LENGTH, None)
        assert run(replace(Greedy, max_tokens=first + 1), eos=token) == (free[: first + 1], LENGTH, None)
        # A stop token in the last place is a stop
        assert run(replace(Greedy, max_tokens=first + 1, stop_token_ids=(token,))) == cut
    for max_tokens in (1, 6):
        assert run(replace(Greedy, max_tokens=max_tokens)) == (free[:max_tokens], LENGTH, None)


def test_without_max_tokens_a_request_runs_to_max_model_len(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(draft_len=5)
    (tokens,) = generate(engine, [PROMPTS[1]], replace(Greedy, max_tokens=None))
    assert len(PROMPTS[1]) + len(tokens) == engine.model.max_model_len


def test_seeded_sampling_depends_on_seed_and_text_alone(make_engine: Callable[..., Engine]) -> None:
    sampling = SamplingParams(temperature=0.9, top_k=20, top_p=0.95, seed=11, max_tokens=12, ignore_eos=True)
    alone = [generate(make_engine(draft_len=0), [prompt], sampling)[0] for prompt in PROMPTS]
    for draft_len, chunk in [(0, 5), (3, 512), (3, 11), (7, 512), (7, 5)]:
        engine = make_engine(draft_len=draft_len, max_num_batched_tokens=chunk, max_num_seqs=5)
        assert generate(engine, PROMPTS, sampling) == alone, (draft_len, chunk)
    assert generate(make_engine(), PROMPTS, replace(sampling, seed=12)) != alone
    greedy = generate(make_engine(), PROMPTS, Greedy)
    assert alone != [tokens[:12] for tokens in greedy]


def test_sampled_tokens_are_the_argmax_with_the_noise_of_their_position(
    make_engine: Callable[..., Engine], checkpoint: Callable[[str], Path]
) -> None:
    from transformers import AutoModelForCausalLM

    sampling = SamplingParams(temperature=0.8, top_k=30, seed=2**40 + 5, max_tokens=12, ignore_eos=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe"), dtype=torch.float32).eval()
    for prompt, tokens in zip(PROMPTS, generate(make_engine(), PROMPTS, sampling), strict=True):
        text = torch.tensor([prompt + tokens])
        with torch.inference_mode():
            logits = model(text).logits[0]
        for position in range(len(prompt), text.shape[1]):
            noise = gumbel(2**40 + 5, 0, position, torch.arange(96))
            scores = filter_logits(logits[position - 1 : position], [sampling.token_sampling()])[0] + noise
            assert int(scores.argmax()) == int(text[0, position])


def test_a_seed_is_drawn_and_repeats_the_output(make_engine: Callable[..., Engine]) -> None:
    sampling = SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True)
    engine = make_engine()
    drawn = [engine.add_request(str(i), PROMPTS[0], sampling) for i in range(2)]
    tokens = drain(engine)
    assert drawn[0].seed != drawn[1].seed
    assert tokens["0"] != tokens["1"]
    assert generate(make_engine(draft_len=0), [PROMPTS[0]], drawn[0]) == [tokens["0"]]


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], Greedy, "prompt: it has no tokens"),
        ([96], Greedy, r"prompt: token ids must be integers in \[0, 95\]"),
        ([-1], Greedy, "prompt: token ids"),
        ([True], Greedy, "prompt: token ids"),
        ([1.0], Greedy, "prompt: token ids"),
        ([1] * 96, Greedy, "prompt: 96 tokens leave no room for output; max_model_len is 96"),
        ([1] * 80, Greedy, r"max_tokens: 20 is not in \[1, 16\]"),
        ([1], replace(Greedy, stop_token_ids=(96,)), r"stop_token_ids: 96 is not in \[0, 95\]"),
        ([1], replace(Greedy, stop_token_ids=(96,), max_tokens=None), r"stop_token_ids: 96 is not in \[0, 95\]"),
    ],
    ids=["empty", "high", "negative", "bool", "float", "long", "max_tokens", "stop", "stop without limit"],
)
def test_a_request_that_cannot_be_served_is_refused_by_field(
    make_engine: Callable[..., Engine], prompt: list[Any], sampling: SamplingParams, message: str
) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match=f"^{message}"):
        engine.add_request("a", prompt, sampling)
    assert not engine.has_requests
    assert not engine.scheduler.waiting


def test_a_request_id_is_used_once_at_a_time(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.add_request("a", PROMPTS[0], Greedy)
    with pytest.raises(ValueError, match=r"^request_id: 'a' is in use"):
        engine.add_request("a", PROMPTS[1], Greedy)
    first = drain(engine)["a"]
    engine.add_request("a", PROMPTS[0], Greedy)
    assert drain(engine)["a"] == first


def test_an_unknown_drafter_is_refused_at_the_start(make_engine: Callable[..., Engine]) -> None:
    with pytest.raises(ValueError, match=r"^drafter: 'oracle'"):
        make_engine(drafter="oracle")


class _Reader:
    """Collects what an engine thread delivers, and wakes when a request has ended."""

    def __init__(self) -> None:
        self.tokens = Tokens()
        self._changed = threading.Condition()

    def deliver(self, outputs: list[RequestOutput]) -> None:
        with self._changed:
            self.tokens.take(outputs)
            self._changed.notify_all()

    def wait(self, request_id: str) -> RequestOutput:
        def ended() -> bool:
            last = self.tokens.last.get(request_id)
            return last is not None and last.finish_reason is not None

        with self._changed:
            assert self._changed.wait_for(ended, timeout=10), f"request {request_id} never ended"
            return self.tokens.last[request_id]


def test_the_engine_thread_serves_and_survives_a_refused_request(make_engine: Callable[..., Engine]) -> None:
    expected = generate(make_engine(), [PROMPTS[0]], Greedy)[0]
    reader = _Reader()
    thread = EngineThread(make_engine(), reader.deliver)
    try:
        with pytest.raises(ValueError, match=r"^prompt: "):
            thread.submit("bad", [], Greedy)
        # The same id twice while the first is live: whatever becomes of the second, the thread goes on
        hold = threading.Event()
        thread.call(lambda: hold.wait(10))
        thread.submit("a", PROMPTS[0], Greedy)
        thread.submit("a", PROMPTS[0], Greedy)
        hold.set()
        thread.submit("b", PROMPTS[0], Greedy)
        assert reader.wait("b").finish_reason == LENGTH
        assert reader.tokens["b"] == expected
        assert thread.stats().num_requests_running == 0
        thread.check_health()
    finally:
        thread.close()


def test_a_dead_engine_ends_every_request_with_an_error(make_engine: Callable[..., Engine]) -> None:
    reader = _Reader()
    thread = EngineThread(
        make_engine(lambda ranks: Failing(ranks, lambda call: call > 2), max_step_retries=1), reader.deliver
    )
    try:
        hold = threading.Event()
        thread.call(lambda: hold.wait(10))
        for request_id in ("a", "b"):
            thread.submit(request_id, PROMPTS[0], Greedy)
        hold.set()
        for request_id in ("a", "b"):
            last = reader.wait(request_id)
            assert last.finish_reason == ERROR
            assert "planted" in (last.error or "")
        with pytest.raises(EngineDeadError, match="planted"):
            thread.check_health()
        with pytest.raises(EngineDeadError, match="planted"):
            thread.submit("c", PROMPTS[0], Greedy)
    finally:
        thread.close()


def test_a_closed_engine_takes_no_requests(make_engine: Callable[..., Engine]) -> None:
    thread = EngineThread(make_engine(), lambda outputs: None)
    thread.close()
    with pytest.raises(EngineDeadError):
        thread.submit("a", PROMPTS[0], Greedy)


class Overlapping(Failing):
    """Failing ranks that have work done while they run, as ranks in other processes do; a failing step is not begun."""

    def __init__(self, ranks: LocalRanks, fails: Callable[[int], bool]) -> None:
        super().__init__(ranks, fails)
        self.meanwhile: Callable[[], None] = lambda: None
        self.log: list[str] = []

    def step(self, plan: StepPlan) -> StepResult:
        if not self.fails(self.calls + 1):
            self.log.append("planned")
            self.meanwhile()
        result = super().step(plan)
        self.log.append("ran")
        return result


@pytest.mark.parametrize("failed", [set(), {3, 4}])
def test_outputs_are_delivered_while_the_next_step_runs(make_engine: Callable[..., Engine], failed: set[int]) -> None:
    expected = generate(make_engine(draft_len=0), [PROMPTS[0]], replace(Greedy, max_tokens=6))[0]
    ranks: list[Overlapping] = []

    def overlapping(local: LocalRanks) -> Overlapping:
        ranks.append(Overlapping(local, lambda call: call in failed))
        return ranks[-1]

    engine = make_engine(overlapping, draft_len=0, max_step_retries=2)
    reader = _Reader()

    def deliver(outputs: list[RequestOutput]) -> None:
        ranks[0].log.append("delivered")
        reader.deliver(outputs)

    thread = EngineThread(engine, deliver, overlap=True)
    ranks[0].meanwhile = thread.hand_over
    try:
        thread.submit("a", PROMPTS[0], replace(Greedy, max_tokens=6))
        assert reader.wait("a").finish_reason == LENGTH
        assert thread.stats().num_requests_finished == {LENGTH: 1}
    finally:
        thread.close()
    assert reader.tokens["a"] == expected
    log = ranks[0].log
    assert log.count("delivered") == 6
    if not failed:
        # the first step has nothing to deliver, the last output no step to wait for
        assert log == ["planned", "ran", *["planned", "delivered", "ran"] * 5, "delivered"]
    else:
        # a step that never begins takes nothing along: what waits goes out after it
        assert "delivered" in log[log.index("ran") + 1 : len(log)]
        assert log.count("planned") == log.count("ran") == 6
